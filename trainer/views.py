"""Views that read anew: what a model reads of a batch in place of its rows, and what it says, by target.

A bound name is a model or the text of a view (`unprompted(ref)`). Its input is made from the rows of a batch,
goes through the model as a batch of its own, and what comes out is put where the targets are. `attention` is
read in the same forward pass. Letters: B rows, T targets, L tokens of a view's row, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from priority_dsl import chance, pairing
from priority_dsl.binding import base_model, bindings, views
from priority_dsl.checked import text
from priority_dsl.folding import fold
from priority_dsl.integrations.heads import WholeLogits, frozen_head, read_head
from priority_dsl.registry import REGISTRY, Statistic
from priority_dsl.values import Value, walk
from trainer.attention import LastAttention
from trainer.batches import Batch
from trainer.data import Example
from trainer.faults import ModelFault

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule
    from priority_dsl.vocab_pass import Head


class Speaker(Protocol):
    """A model without gradient: `head` is a `WholeLogits` where it is not taken apart."""

    @property
    def model(self) -> Any:
        """The causal language model."""
        ...

    @property
    def head(self) -> Head:
        """Its output head."""
        ...

    @property
    def bf16(self) -> bool:
        """Whether it runs under autocast."""
        ...


@dataclass(frozen=True, slots=True)
class Living:
    """A model that changes as the run goes on, without gradient: its head is read anew each time."""

    model: Any
    apart: bool
    bf16: bool

    @property
    def head(self) -> Head:
        """The output head; a `WholeLogits` where the model is not taken apart."""
        if not self.apart:
            return WholeLogits(torch.empty(0))
        return frozen_head(read_head(self.model), self.bf16)


@dataclass(frozen=True, slots=True)
class Noise:
    """Even noise on the input embeddings: which call of the rule draws it, and whether once or each epoch."""

    scale: float
    place: tuple[int, ...]
    once: bool

    def on(self, embedded: Tensor, lengths: Tensor, examples: Tensor, epoch: int, seed: int) -> Tensor:
        """The noise of embeddings `[B, L, D]` of rows with `lengths` `[B]` tokens.

        `examples` `[B]` are the numbers of the rows. It depends on seed, epoch, example, place and entry
        alone, never on the batch.
        """
        tokens, width = embedded.shape[1:]
        device = embedded.device
        entry = torch.arange(tokens * width, device=device).reshape(tokens, width)
        key, epoch = torch.tensor(seed, device=device), 0 if self.once else epoch
        one = torch.ones((), device=device)
        drawn = chance.uniform(key, epoch, examples.reshape(-1, 1, 1), entry, self.place, one)
        bound = self.scale / (lengths * width).float().sqrt()
        return ((2 * drawn - 1) * bound.reshape(-1, 1, 1)).to(embedded.dtype)


@dataclass(frozen=True, slots=True)
class Sight:
    """What is bound under a name: of which model, behind which prompt, with which noise.

    `prompt` is None for the row's own, empty for none, else the text column. `inside` are the statistics that
    are read inside its forward pass.
    """

    model: str
    prompt: str | None
    noises: tuple[Noise, ...]
    inside: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """What a model reads, a row a line: `ids` `[R, L]` with right padding, `lengths` `[R]` of the rows.

    `examples` `[R]` number the rows; `rows` and `places` `[B, T]` say in which row and where in it each
    target is predicted; `outside` `[R, L]` marks the tokens outside the response.
    """

    ids: Tensor
    lengths: Tensor
    examples: Tensor
    rows: Tensor
    places: Tensor
    outside: Tensor

    def at_targets(self, values: Tensor) -> Tensor:
        """Values `[R, L, D]` where the targets are predicted, `[B, T, D]`; any where there is no target."""
        index = self.rows * values.shape[1] + self.places
        return values.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


class Views:
    """The models and views that a rule reads, as forward passes on its batches."""

    def __init__(self, rule: CompiledRule, tokenizer: Any, seed: int = 0) -> None:
        roots = rule.checked.everything
        inside = [v for v in walk(*roots) if _is_inside(v)]
        self.seed = seed
        self.inside = frozenset(text(v) for v in inside)
        self._tokenizer = tokenizer
        self.sights = {
            name: _sight(value, rule.params, tuple(text(v) for v in inside if text(v.arguments[0]) == name))
            for name, value in bindings(*roots).items()
        }
        self._attention: dict[int, LastAttention] = {}  # by the model's identity; the model is held with it

    def base(self, name: str) -> str:
        """The model that a bound name is a view of."""
        return self.sights[name].model if name in self.sights else name

    def of(self, model: str) -> list[str]:
        """The views of a model that run apart from it, by name."""
        return sorted(name for name, sight in self.sights.items() if sight.model == model and name != model)

    def plain(self, name: str) -> bool:
        """Whether a bound name is a model that reads the rows as they are, and nothing is read inside it."""
        return name not in self.sights or self.sights[name] == Sight(self.base(name), None, (), ())

    def run(
        self, name: str, model: Any, whole: bool, batch: Batch, epoch: int, wanted: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A forward pass of what is bound under a name, at the targets of a batch.

        Hidden states `[B, T, D]`, or logits `[B, T, V]` where the model is taken `whole`; and the `wanted`
        statistics that are read inside, `[B, T]` float32, detached.
        """
        sight = self.sights.get(name, Sight(name, None, (), ()))
        inside = [statistic for statistic in sight.inside if statistic in wanted]
        if not inside and sight.prompt is None and not sight.noises:
            return _says(model, whole, {"input_ids": batch.input_ids, **batch.others}), {}
        given = self.input(sight, batch)
        if not inside:  # nothing is predicted by the last token of a row
            said = _says(model, whole, self._read_by(model, given, sight, given.ids[:, :-1], epoch))
            return given.at_targets(said), {}
        with self._watching(model).watched() as caught:
            said = _says(model, whole, self._read_by(model, given, sight, given.ids, epoch))
        paid = caught.paid(given.outside)[:, 1:].unsqueeze(-1)  # once read, a token stands one place on
        at = given.at_targets(paid).squeeze(-1)
        return given.at_targets(said), dict.fromkeys(inside, at)

    def _read_by(self, model: Any, given: Input, sight: Sight, ids: Tensor, epoch: int) -> dict[str, Tensor]:
        """What a model is called with: token ids of rows, or their embeddings with noise."""
        if not sight.noises:
            return {"input_ids": ids}
        embedded = model.get_input_embeddings()(ids)
        for noise in sight.noises:
            embedded = embedded + noise.on(embedded, given.lengths, given.examples, epoch, self.seed)
        return {"inputs_embeds": embedded}

    @torch.no_grad()
    def frozen(
        self, models: Mapping[str, Speaker], batch: Batch, epoch: int, wanted: Collection[str]
    ) -> tuple[dict[str, tuple[Tensor, Head]], dict[str, Tensor]]:
        """What models without gradient say under their bound names, `(hidden [B, T, D], head)`, and what is
        read inside them."""
        said: dict[str, tuple[Tensor, Head]] = {}
        inside: dict[str, Tensor] = {}
        for name, model in models.items():
            head = model.head
            whole = isinstance(head, WholeLogits)
            with torch.autocast(batch.targets.device.type, torch.bfloat16, enabled=model.bf16):
                values, read = self.run(name, model.model, whole, batch, epoch, wanted)
            said[name] = (values if whole else values.to(head.weight.dtype), head)
            inside |= read
        return said, inside

    def input(self, sight: Sight, batch: Batch) -> Input:
        """The input of a view: the rows of a batch or their responses behind another prompt, a row a line."""
        rows, device = batch.rows, batch.targets.device
        own = [self._read(sight, row) for row in rows]
        lengths = [len(ids) for ids, _ in own]
        width = max(lengths)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in own], device=device)
        outside = torch.tensor([marks + [False] * (width - len(marks)) for _, marks in own], device=device)
        at, places = (torch.zeros(batch.targets.shape, dtype=torch.long) for _ in range(2))
        for number, (row, (_, marks), where) in enumerate(zip(rows, own, batch.spans, strict=True)):
            at[where] = number
            if sight.prompt is None:
                places[where] = torch.arange(len(row.ids) - 1)
            else:
                _predicted(places[where], row, sum(marks))
        numbers = [_number(row) for row in rows]
        return Input(
            ids, torch.tensor(lengths, device=device), torch.tensor(numbers, device=device), at.to(device),
            places.to(device), outside,
        )  # fmt: skip

    def _read(self, sight: Sight, row: Example) -> tuple[list[int], list[bool]]:
        """The token ids of a row as the view reads them, and which of them are outside the response."""
        if sight.prompt is None:
            return row.ids, [not mark for mark in row.response]
        before = [begin_token(self._tokenizer)] if sight.prompt == "" else row.prompts[sight.prompt]
        response = [token for token, mark in zip(row.ids, row.response, strict=True) if mark]
        return [*before, *response], [True] * len(before) + [False] * len(response)

    def _watching(self, model: Any) -> LastAttention:
        if id(model) not in self._attention:
            self._attention[id(model)] = LastAttention(model)
        return self._attention[id(model)]


def begin_token(tokenizer: Any) -> int:
    """What stands before a response that is read without a prompt: the begin token, else the end token."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelFault(
        "the tokenizer has neither a begin nor an end token, so nothing can stand before a response alone"
    )


def frozen_names(rule: CompiledRule) -> set[str]:
    """The frozen models that a rule reads, all of which but `ref` must be bound."""
    moving = {name for name, model in rule.models.items() if model.ema is not None}
    return set(rule.requires.models) - {"on"} - moving


def _is_inside(value: Value) -> bool:
    word = REGISTRY.get(value.word)
    return isinstance(word, Statistic) and word.inside


def _sight(value: Value, params: Mapping[str, float], inside: tuple[str, ...]) -> Sight:
    """What a bound value reads; of several prompts the innermost, which is the one that the model sees."""
    prompt: str | None = None
    noises: list[Noise] = []
    for view in views(value):
        if view.word == "perturbed":
            place: Any = view.option("place")
            noises.append(Noise(fold(view.arguments[1], params), place, bool(view.option("once"))))
        else:
            prompt = "" if view.word == "unprompted" else str(view.arguments[1].option("name"))
    return Sight(base_model(value), prompt, tuple(noises), inside)


def _number(row: Example) -> int:
    """The number of an example by which chance is keyed; the responses of a pair have two."""
    if row.chosen is None:
        return row.index
    return int(pairing.numbered(torch.tensor(row.index), torch.tensor(row.chosen)))


def _predicted(line: Tensor, row: Example, before: int) -> None:
    """Where each response token of a row is predicted behind a prompt of `before` tokens, at its target."""
    marks = [i for i, mark in enumerate(row.response) if mark]
    for number, i in enumerate(marks):
        if i > 0:
            line[i - 1] = before + number - 1


def _says(model: Any, whole: bool, read: Mapping[str, Tensor]) -> Tensor:
    """Hidden states or logits of what a model reads."""
    if whole:
        return model(**read, use_cache=False).logits
    return model.base_model(**read, use_cache=False).last_hidden_state
