"""Before training: the statistics of frozen models, computed once for each row and kept in the cache.

A pass of the plan loads its models, runs the rows that the cache does not know through them in batches of
similar length, writes their statistics in shards, and frees the models. Training then reads stored columns.
Letters: B rows of a batch, T targets.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from priority_dsl.chance import draws
from priority_dsl.checked import text
from priority_dsl.integrations.heads import HeadedModel, take_apart
from priority_dsl.kinds import Element
from priority_dsl.values import Value, walk
from trainer.batches import IGNORED, Batch, collate
from trainer.cache import Entry
from trainer.data import Example
from trainer.faults import RunFault
from trainer.fingerprints import (
    folder_fingerprint,
    memory_fingerprint,
    template_fingerprint,
    tokenizer_fingerprint,
)
from trainer.models import Quantize, load_frozen, load_model
from trainer.portions import batches_by_length, key_of, shards
from trainer.runlog import RunLog
from trainer.views import Views

if TYPE_CHECKING:
    from priority_dsl.plan import Pass
    from priority_dsl.rule import CompiledRule

Known = dict[str, dict[str, np.ndarray]]  # statistic -> row key -> values, one a target token
BATCH_TOKENS = 8192  # of a batch at least; more where a micro-batch of training holds more
STORED_ROWS = 256  # rows whose stored columns are computed together


@dataclass(frozen=True, slots=True)
class Source:
    """Where frozen models come from, and in what precision they run.

    `model` is the folder that the run starts from, `bind` the folders of other models, `cache` the cache's;
    `seed` is that of what views draw once. `quantize` holds `model` in fewer bits, not those that are bound.
    `trust` lets models run Python code of their own.
    """

    model: str
    bind: Mapping[str, str]
    tokenizer: Any
    cache: Path
    bf16: bool
    batch_size: int
    seed: int = 0
    quantize: Quantize | None = None
    trust: bool = False

    def folder_of(self, name: str) -> str:
        """The folder (or hub name) of a model of the rule."""
        return self.bind.get(name, self.model)


def store_columns(
    rows: Sequence[Example], precompute: Precompute, numbers: Mapping[str, torch.Tensor], seed: int
) -> list[Example]:
    """The rows with the stored columns of the rule's plan, computed or read from the cache.

    `numbers` are those of the whole data set, `seed` that of what is drawn once.
    Every process calls this with the same rows. Afterwards no model of a pass is in memory. Raises `Fault`
    for models, cache and rows that cannot be used.
    """
    return with_stored(precompute.rule, rows, precompute.run(rows), numbers, seed)


class Precompute:
    """The passes of a rule's plan over rows. All processes share the work and each gets all values."""

    def __init__(
        self,
        rule: CompiledRule,
        source: Source,
        accelerator: Accelerator,
        log: RunLog,
        start: Any | None = None,
    ) -> None:
        """`start` is the model that the run begins from where it is in memory and stays as it is: an unbound
        `ref` is that very model, put into eval mode."""
        self.rule = rule
        self.source = source
        self.start = start
        self.accelerator = accelerator
        self.log = log
        self.views = Views(rule, source.tokenizer, source.seed)
        self._prints: dict[str, str] = {}  # by folder
        self.computed: dict[str, int] = {}  # rows that went through models, by what the pass keeps

    def run(self, rows: Sequence[Example], passes: Iterable[Pass] | None = None) -> Known:
        """The statistics of all rows: of the passes that training reads, or of others of the plan."""
        by_key = {key_of(row, self.rule.over): row for row in rows}
        known: Known = {}
        for of in self.rule.plan.passes if passes is None else passes:
            known.update(self._pass(of, by_key))
        return known

    def _pass(self, of: Pass, rows: Mapping[str, Example]) -> Known:
        entries = self._shared(lambda: self._entries(of))
        # One process looks: while another already writes, the others would each see less work to share.
        missing: set[str] = self._shared(lambda: self._missing(entries, rows))
        self.computed[_title(of)] = self.computed.get(_title(of), 0) + len(missing)
        if missing:
            self.log.note(f"{_title(of)}: {len(missing)} rows through {_models(of)}, once before training")
            models = self._load(of.models)
            self.compute(of, entries, {key: row for key, row in rows.items() if key in missing}, models)
            models.clear()
            release(self.accelerator)
            self.accelerator.wait_for_everyone()
        elif rows:
            self.log.note(f"{_title(of)}: {len(rows)} rows from the cache, no forward pass")
        known = {name: entry.read(rows.keys(), self.log.note) for name, entry in entries.items()}
        if any(key not in values for key in rows for values in known.values()):
            raise RunFault(
                f"{_title(of)}: rows that were computed are not in the cache {self.source.cache}: it was "
                "cleared meanwhile, or the processes do not share it; start again, with --cache on a shared "
                "folder"
            )
        return known

    def _missing(self, entries: Mapping[str, Entry], rows: Mapping[str, Example]) -> set[str]:
        known = [entry.read(rows.keys(), self.log.note) for entry in entries.values()]
        return {key for key in rows if any(key not in values for values in known)}

    def compute(
        self,
        of: Pass,
        entries: Mapping[str, Entry],
        rows: Mapping[str, Example],
        models: Mapping[str, HeadedModel],
    ) -> None:
        """Run this process's shards of some rows through the models of a pass, and keep the statistics."""
        longest = max(len(row.ids) for row in rows.values())
        budget = max(BATCH_TOKENS, self.source.batch_size * longest)
        work = [*shards(batches_by_length(rows, budget), rows)]
        mine = work[self.accelerator.process_index :: self.accelerator.num_processes]
        for entry in entries.values():
            entry.sweep_up()
        tokens = sum(len(rows[key].ids) for shard in mine for batch in shard for key in batch)
        with self.log.bar(tokens, "tok") as bar:
            for shard in mine:
                self._keep(of, entries, models, [[(key, rows[key]) for key in batch] for batch in shard], bar)

    def _keep(
        self,
        of: Pass,
        entries: Mapping[str, Entry],
        models: Mapping[str, HeadedModel],
        shard: list[list[tuple[str, Example]]],
        bar: Any,
    ) -> None:
        found: Known = {name: {} for name in entries}
        for keyed in shard:
            batch = collate([row for _, row in keyed], self.rule.over, ()).to(self.accelerator.device)
            values = statistics_of(self.rule, of, models, batch, self.views)
            for name, of_batch in values.items():
                for (key, _), of_row in zip(keyed, of_batch, strict=True):
                    found[name][key] = of_row
            bar.update(batch.tokens)
        for name, entry in entries.items():
            entry.write(found[name])

    def _load(self, names: Iterable[str]) -> dict[str, HeadedModel]:
        """The models of some bound names, views of one model sharing it."""
        source, base = self.source, {name: self.views.base(name) for name in names}
        own = set() if self.start is None else set(base.values()) - source.bind.keys()
        loaded = load_frozen(
            set(base.values()) - own, source.model, source.bind, source.tokenizer, source.quantize,
            source.trust,
        )  # fmt: skip
        loaded |= {name: self.start.eval() for name in own if self.start is not None}
        apart = {
            name: take_apart(model.to(self.accelerator.device), source.bf16, self.log.note)
            for name, model in loaded.items()
        }
        return {name: apart[model] for name, model in base.items()}

    def _entries(self, of: Pass) -> dict[str, Entry]:
        """The place of each statistic in the cache. Its key says all that the values depend on."""
        source = self.source
        read = {self.views.base(name) for name in of.models}
        prints = {name: self._fingerprint(source.folder_of(name)) for name in read}
        shown = ", ".join(source.folder_of(name) for name in sorted(read))
        entries = {}
        for name, statistic in zip(of.names, of.statistics, strict=True):
            about = {
                "statistic": _anonymous(statistic),
                "models": [prints[model] for model in _model_names(statistic)],
                "settings": self._settings(statistic),
                "tokenizer": tokenizer_fingerprint(source.tokenizer),
                "template": template_fingerprint(source.tokenizer),
                "precision": "bf16" if source.bf16 else "fp32",
            }
            if any(draws(part) for part in walk(statistic)):
                about["seed"] = source.seed
            if source.quantize is not None and set(_model_names(statistic)) - source.bind.keys():
                about["precision"] += f" {source.quantize.bits}"
            entries[name] = Entry(source.cache, about, {"statistic": name, "model": shown})
        return entries

    def _fingerprint(self, folder: str) -> str:
        if folder not in self._prints:
            local = Path(folder).is_dir()  # what a hub name stands for is known when it is loaded
            if local:
                self._prints[folder] = folder_fingerprint(Path(folder))
            else:
                self._prints[folder] = memory_fingerprint(load_model(folder, trust=self.source.trust))
        return self._prints[folder]

    def _settings(self, statistic: Value) -> dict[str, float]:
        """The parameters that a statistic itself reads (`tempered(ref, t)`), not those around it."""
        read = [str(part.option("name")) for part in walk(statistic) if part.word == "param"]
        return {name: self.rule.params[name] for name in read}

    def _shared(self, make: Callable[[], Any]) -> Any:
        """What the main process makes, on every process."""
        if self.accelerator.num_processes == 1:
            return make()
        made = [make() if self.accelerator.is_main_process else None]
        return broadcast_object_list(made)[0]


def statistics_of(
    rule: CompiledRule,
    of: Pass,
    models: Mapping[str, HeadedModel],
    batch: Batch,
    views: Views | None = None,
) -> dict[str, list[np.ndarray]]:
    """The statistics of a pass on one batch: for each row its values, one a target token, float32 or bool.

    `models` by bound name; `views` run those that are more than a model on the rows.
    """
    if views is None:
        pairs, inside = {name: models[name](batch.input_ids) for name in of.models}, {}
    else:
        pairs, inside = views.frozen({name: models[name] for name in of.models}, batch, 0, of.inside)
    values = rule.statistics(of, pairs, batch.targets, stored=inside)
    live = (batch.targets != IGNORED).cpu()
    kinds = {n: bool if s.kind.element == Element.BOOL else np.float32
             for n, s in zip(of.names, of.statistics, strict=True)}  # fmt: skip
    return {
        name: [row[mask].numpy().astype(kinds[name]) for row, mask in zip(of_name.cpu(), live, strict=True)]
        for name, of_name in values.items()
    }


def with_stored(
    rule: CompiledRule,
    rows: Sequence[Example],
    known: Known,
    numbers: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> list[Example]:
    """The rows with the stored columns of the plan, from the statistics of its passes by row."""
    if not rule.plan.stored:
        return list(rows)
    stored = []
    for start in range(0, len(rows), STORED_ROWS):
        part = rows[start : start + STORED_ROWS]
        batch = collate(part, rule.over, rule.requires.columns)
        columns = rule.stored_columns(
            batch.targets,
            statistics={name: laid_out(rule, part, values, batch) for name, values in known.items()},
            columns=batch.columns,
            examples=batch.examples,
            seed=seed,
            numbers=numbers,
        )
        arrays = {name: values.numpy() for name, values in columns.items()}
        stored += [
            replace(row, stored={name: a[i, : len(row.ids) - 1].copy() for name, a in arrays.items()})
            for i, row in enumerate(part)
        ]
    return stored


def laid_out(
    rule: CompiledRule, rows: Sequence[Example], values: Mapping[str, np.ndarray], batch: Batch
) -> torch.Tensor:
    """Values by row, one a target token, as float32 `[B, T]`, 0 where ignored."""
    flat = np.concatenate([values[key_of(row, rule.over)] for row in rows])
    laid_out = torch.zeros(batch.targets.shape)
    return laid_out.masked_scatter(batch.targets != IGNORED, torch.from_numpy(flat.astype(np.float32)))


def release(accelerator: Accelerator) -> None:
    """Give back the memory of models that nothing holds any more."""
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def _anonymous(statistic: Value) -> str:
    """The text of a statistic with its models numbered: what a model is called does not change its values."""
    names = _model_names(statistic)
    known: dict[Value, Value] = {}
    for part in walk(statistic):
        options = part.options
        if part.word == "model":
            options = (("name", f"model{names.index(str(part.option('name')))}"),)
        known[part] = Value(part.word, tuple(known[a] for a in part.arguments), options, part.kind, part.span)
    return text(known[statistic])


def _model_names(statistic: Value) -> list[str]:
    """The models that a statistic reads, in the order of its text."""
    return [str(part.option("name")) for part in walk(statistic) if part.word == "model"]


def _title(of: Pass) -> str:
    return f"{', '.join(of.names)}"


def _models(of: Pass) -> str:
    return f"the frozen model{'s' if len(of.models) > 1 else ''} {', '.join(of.models)}"
