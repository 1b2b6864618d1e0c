"""What a run needs before its first step: rule, data, models, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from priority_dsl import compile_rule
from priority_dsl.integrations.heads import HeadedModel, WholeLogits, take_apart, why_whole
from trainer.adapters import Adapter, Base, add_adapter, is_adapter
from trainer.batches import Spread, step_examples
from trainer.cache import cache_folder
from trainer.checkpoints import Lasting, Position, check_whole, read_position, restore, restore_lasting
from trainer.columns import ColumnReader, check_categories
from trainer.config import TrainConfig
from trainer.data import Example, Examples, Reader
from trainer.dataset import leave_out, refuse_online, refuse_streaming, stored
from trainer.examples import write_summary
from trainer.faults import ConfigFault, DataFault
from trainer.folder import RunFolder
from trainer.health import Health
from trainer.keeping import HeldOut
from trainer.manifest import write_manifest
from trainer.models import (
    Quantize,
    check_bindings,
    checkpoint_activations,
    compile_body,
    context_of,
    load_frozen,
    load_model,
    load_tokenizer,
    quieten,
    vocabulary_of,
)
from trainer.moving import Moving
from trainer.objective import Objective
from trainer.optimizing import make_optimizer, make_schedule
from trainer.order import Order, Shuffled
from trainer.packing import check_masks
from trainer.precompute import Precompute, Source, store_columns
from trainer.prompts import PromptReader
from trainer.runlog import RunLog
from trainer.sharding import make_accelerator, refuse_sharded, spread_out
from trainer.spreading import make_spread
from trainer.stopping import Stopping
from trainer.stream import Stream
from trainer.strict import refuse_warnings
from trainer.trained import Trained
from trainer.views import Speaker, Views, frozen_names

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule

Part = Callable[[Examples, Examples], tuple[Examples, Examples]]


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is ready to go: everything that its steps use. `start` is where it begins or goes on."""

    config: TrainConfig
    rule: CompiledRule
    folder: RunFolder
    log: RunLog
    accelerator: Accelerator
    tokenizer: Any
    policy: Any
    optimizer: Any
    schedule: Any
    objective: Objective
    spread: Spread
    order: Order
    held_out: list[Example]
    start: Position
    moving: Moving
    measured: HeldOut
    health: Health
    stopping: Stopping
    adapter: Adapter | None = None
    lasting: dict[str, Lasting] = field(default_factory=dict)


def prepare(config: TrainConfig, part: Part | None = None) -> Run:
    """Make a run ready. The output folder is checked first and written last, when nothing else can fail.

    `part` says which of the rows that were read are prepared (--dry-run).
    """
    quieten()
    rule = compile_rule(config.rule, **config.set)
    if config.strict:
        refuse_warnings(rule.checked)
    if config.online_reference:
        refuse_online(rule)
    if config.streaming:
        refuse_streaming(rule, config.online_reference)
    check_bindings(frozen_names(rule), config.bind)
    folder = RunFolder(config)
    folder.check()
    checkpoint = folder.newest() if config.resume else None
    if checkpoint is not None:
        check_whole(checkpoint)

    accelerator = make_accelerator(config)
    log = RunLog(folder.path, accelerator.is_main_process, config.quiet)
    for warning in rule.checked.warnings:
        log.note(f"{warning}\n")
    tokenizer = load_tokenizer(config.model, config.chat_template, config.trust_remote_code)
    policy = load_policy(config, checkpoint)
    reader = make_reader(config, rule, policy, tokenizer)
    data, held = read_data(config, rule, reader, log)
    if part is not None:
        data, held = part(data, held)
    held_out = held.rows
    source = Source(
        config.model, config.bind, tokenizer, cache_folder(config.cache), config.dtype == "bf16",
        config.batch_size, config.seed, Quantize.of(config), config.trust_remote_code,
    )  # fmt: skip
    # The base of an adapter stays as it is: the passes of `ref` need no model of their own.
    precompute = Precompute(rule, source, accelerator, log, None if config.lora is None else policy)
    if not config.streaming:
        data = leave_out(data, precompute, config.seed)
        log.note(f"data: {data}")

    spread = make_spread(config, accelerator, data, held_out, policy, log)
    epoch_steps = Shuffled(data.rows, spread, config.seed).epoch_steps
    start = Position(0, planned_steps(config, epoch_steps), spread.rows, data.fingerprint)
    folder.check_finished(start.planned)
    if checkpoint is not None:
        start = continued(checkpoint, start, log)
    elif config.resume:
        log.note(f"no checkpoint in {folder.path}: starting at step 0")
    rows = data.rows
    if not config.online_reference:
        visited = [] if config.streaming else visited_rows(len(rows), start.planned, spread, config.seed)
        rows, numbers = stored(rows, visited, precompute, config.seed)
        held_out = store_columns(held_out, precompute, numbers, config.seed)
    adapter = None if config.lora is None else add_adapter(policy, config)
    if checkpoint is not None and adapter is not None:
        adapter.restore(checkpoint)
    policy.train()
    fused = takes_apart(policy, rule, config, log)
    views = precompute.views
    refuse_sharded(rule, config, bool(views.inside), accelerator)
    needed = kept_names(rule, config, views)
    base = None if adapter is None else Base.of(adapter, needed, views, config, fused)
    frozen = load_kept(
        needed - (base.names if base else set()), rule, config, tokenizer, accelerator, log, views
    )
    if spread.packing is not None:
        check_masks({name: frozen[name].model for name in frozen if views.plain(name)}, spread.packing.mask)
    # Here, so that a run draws the same whether or not its statistics were in the cache.
    set_seed(config.seed, device_specific=True)
    if config.checkpoint_activations:
        checkpoint_activations(policy)
    bf16 = config.dtype == "bf16"
    averages = {name: m.ema for name, m in rule.models.items() if m.ema is not None}
    moving = Moving(policy.to(accelerator.device), averages, fused, bf16)
    if config.compile:
        compile_body(policy, config.compile_backend, accelerator.device)
    trained = Trained(policy, rule, fused, bf16, views, base)
    trained, optimizer = spread_out(trained, make_optimizer(policy, config), accelerator)
    schedule = make_schedule(optimizer, config, start.planned)
    measured, health, stopping = HeldOut(), Health(config, vocabulary_of(policy)), Stopping(config)
    # What else a resumed run must know again joins here.
    lasting: dict[str, Lasting] = {"held_out": measured, "health": health, "stopping": stopping}
    order: Order = Shuffled(rows, spread, config.seed)
    if config.streaming:
        order = Stream(reader, config, rule, spread, log.note)
        lasting["stream"] = order
    if checkpoint is not None:
        moving.restore(checkpoint)
        restore(checkpoint, trained, optimizer, schedule, accelerator)
        restore_lasting(checkpoint, lasting)
    if accelerator.is_main_process:
        folder.open(self_contained(rule, config))
        write_summary(folder.path, data=data.summary(), held_out=held.summary())
        log.cut(start.step)
        write_manifest(folder.path, config, rule, accelerator, tokenizer, precompute.computed)
    accelerator.wait_for_everyone()
    for name in rule.plan.kept:
        if views.base(name) in moving.models:
            frozen[name] = moving.models[views.base(name)]
    objective = Objective(rule, trained, frozen, views, accelerator, config.seed, config.skip_non_finite)
    return Run(
        config, rule, folder, log, accelerator, tokenizer, policy, optimizer, schedule, objective, spread,
        order, held_out, start, moving, measured, health, stopping,
        adapter, lasting,
    )  # fmt: skip


def visited_rows(count: int, planned: int, spread: Spread, seed: int) -> list[int]:
    """The rows, of `count`, that one of the planned steps visits: all of them after an epoch."""
    steps = step_examples(count, spread, seed, epoch=0)
    return sorted({row for step in steps[:planned] for row in step})


def takes_apart(policy: Any, rule: CompiledRule, config: TrainConfig, log: RunLog) -> bool:
    """Whether the trained model is taken apart into body and head for the fused loss.

    Says so where it cannot be; `ConfigFault` where --loss fused was asked for.
    """
    reason = None if config.loss == "dense" else why_whole(policy)
    if reason is None and rule.trained_views:
        reason = f"the gradient flows through {', '.join(sorted(rule.trained_views))}"
    if reason is not None and config.loss == "fused":
        raise ConfigFault(f"--loss fused: {reason}; without the flag this run trains on full logits")
    if reason is not None:
        log.note(f"{reason}: training holds full logits (--loss dense)")
    return config.loss != "dense" and reason is None


def load_policy(config: TrainConfig, checkpoint: Path | None) -> Any:
    """The model that is trained, as the run begins or as a checkpoint left it; of an adapter its base.

    Raises `ConfigFault` for an adapter, which is no model to begin from: what would `ref` be?
    """
    if is_adapter(config.model):
        raise ConfigFault(
            f"--model {config.model}: is an adapter, and a run begins from a whole model: make one with "
            f"`priority merge --model {config.model} --output FOLDER`; --resume continues a run"
        )
    if config.lora is None:
        return load_model(str(checkpoint or config.model), trust=config.trust_remote_code)
    return load_model(config.model, quantize=Quantize.of(config), trust=config.trust_remote_code)


def kept_names(rule: CompiledRule, config: TrainConfig, views: Views) -> set[str]:
    """The frozen models that training runs, by bound name: all under --online-reference, else those of which
    it reads whole distributions, and views that draw."""
    swept = swept_names(rule) if config.online_reference else set()
    frozen = frozen_names(rule)
    return {name for name in swept | set(rule.plan.kept) if views.base(name) in frozen}


def swept_names(rule: CompiledRule) -> set[str]:
    """The bound names that the passes before training read."""
    return {name for of in rule.plan.passes for name in of.models}


def load_kept(
    needed: set[str],
    rule: CompiledRule,
    config: TrainConfig,
    tokenizer: Any,
    accelerator: Accelerator,
    log: RunLog,
    views: Views,
) -> dict[str, Speaker]:
    """The `needed` frozen models by bound name; under --loss dense those that no pass reads give logits."""
    swept = swept_names(rule) if config.online_reference else set()
    loaded = load_frozen(
        {views.base(name) for name in needed}, config.model, config.bind, tokenizer,
        trust=config.trust_remote_code,
    )  # fmt: skip
    bf16 = config.dtype == "bf16"
    apart, whole = {}, {}
    for name, model in loaded.items():
        model.to(accelerator.device)
        whole[name] = HeadedModel(model, WholeLogits(torch.empty(0)), bf16)
        if config.loss != "dense" or name in map(views.base, swept):
            apart[name] = take_apart(model, bf16, log.note)
    kinds = {name: apart if name in swept or config.loss != "dense" else whole for name in needed}
    return {name: kinds[name][views.base(name)] for name in needed}


def self_contained(rule: CompiledRule, config: TrainConfig) -> str:
    """The canonical text of the rule, and in a comment the parameter values that the run gave it."""
    given = " ".join(f"--set {name}={value}" for name, value in config.set.items())
    return f"# run with {given}\n{rule.text}" if given else rule.text


def make_reader(config: TrainConfig, rule: CompiledRule, policy: Any, tokenizer: Any) -> Reader:
    """What reads rows with the columns that the rule reads."""
    limits = [n for n in (context_of(policy), config.max_length) if n is not None]
    return Reader(
        config,
        tokenizer,
        vocabulary_of(policy),
        min(limits, default=None),
        ColumnReader(rule.columns, rule.checked.source.name),
        roles="role" in rule.requires.columns,
        pairs=rule.checked.reads_pairs,
        prompts=PromptReader.of(rule, config, tokenizer, context_of(policy)),
    )


def read_data(
    config: TrainConfig, rule: CompiledRule, reader: Reader, log: RunLog
) -> tuple[Examples, Examples]:
    """The training and the held-out examples; of a stream, its first rows, to see that they can be read."""
    data = reader.first(config.data) if config.streaming else reader.read(config.data)
    try:
        check_categories(rule.columns, [row.columns for row in data.rows])
    except DataFault as fault:
        if not config.streaming:
            raise
        log.note(f"warning: in the first rows of the stream {fault}")
    if config.streaming:
        log.note(f"data: a stream, whose first rows are: {data}")
    held = reader.read(config.eval_data) if config.eval_data else Examples([], 0)
    if held.rows:
        log.note(f"held-out data: {held}")
    return data, held


def planned_steps(config: TrainConfig, epoch_steps: int) -> int:
    """The optimizer steps of the run: --max-steps, the epochs, or what ends first where both are given."""
    by_epochs = epoch_steps * (config.epochs or 1)
    if config.max_steps is None:
        return by_epochs
    return config.max_steps if config.epochs is None else min(config.max_steps, by_epochs)


def continued(checkpoint: Any, start: Position, log: RunLog) -> Position:
    """Where a run goes on, or `ConfigFault` where the step or the data are not those of the checkpoint."""
    saved = read_position(checkpoint)
    if saved.rows != start.rows:
        raise ConfigFault(
            f"--resume: a step had {saved.rows} rows and has {start.rows} now; keep the product of "
            "--batch-size, --accumulation and the number of processes"
        )
    if saved.data != start.data:
        raise ConfigFault(
            "--resume: the data are not those that the run began with (other rows or token ids)"
        )
    if saved.planned != start.planned:
        log.note(
            f"the plan was {saved.planned} steps and is {start.planned} now: schedule and progress follow it"
        )
    log.note(f"continuing at step {saved.step} of {start.planned} from {checkpoint}")
    return Position(saved.step, start.planned, start.rows, start.data)
