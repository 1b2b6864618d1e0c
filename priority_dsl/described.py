"""What the checker knows of a rule, as its users ask for it."""

from __future__ import annotations

from typing import Literal

from priority_dsl.binding import bindings
from priority_dsl.checked import CheckedRule, Column, ModelDeclaration, Regime, Requires
from priority_dsl.kinds import Element, Range, Stage
from priority_dsl.printer import format_rule
from priority_dsl.registry import REGISTRY, Reading, Statistic
from priority_dsl.values import carrying, walk


class Described:
    """A checked rule and what follows from it without a tensor; immutable."""

    def __init__(self, checked: CheckedRule) -> None:
        self.checked = checked

    @property
    def text(self) -> str:
        """The canonical text of the rule."""
        return format_rule(self.checked.tree)

    @property
    def params(self) -> dict[str, float]:
        """The parameter values in force."""
        return {name: p.value for name, p in self.checked.params.items()}

    @property
    def models(self) -> dict[str, ModelDeclaration]:
        """The declared models beside `on` and `ref`."""
        return dict(self.checked.models)

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that the rule reads without `role` and `response`, with what its regexes ask."""
        read = self.checked.requires.columns
        return {n: c for n, c in self.checked.columns.items() if n in read and not _is_reading(n)}

    @property
    def requires(self) -> Requires:
        """The names of the models, statistics and columns that the rule reads."""
        return self.checked.requires

    @property
    def regime(self) -> Regime:
        """The regime of the taxonomy, derived."""
        return self.checked.regime

    @property
    def range(self) -> Range:
        """The values that a weight can take."""
        return self.checked.range

    @property
    def over(self) -> Literal["response", "all"]:
        """Which tokens the targets hold: the response's, or every real token but the first."""
        return self.checked.over

    @property
    def observes_model(self) -> bool:
        """Whether what `observe` adds up depends on what models say: it then needs logits or stored values.

        So it is where the denominator counts weights that read models, and where a value of the batch does.
        """
        return self._observes(Stage.FROZEN)

    @property
    def observes_on(self) -> bool:
        """Whether it depends on the trained model itself, so that stored values are not enough."""
        return self._observes(Stage.ONLINE)

    def _observes(self, earliest: Stage) -> bool:
        counts_weights = self.checked.normalize in ("kept", "weights")
        roots = [self.checked.weight] * counts_weights + list(self.checked.batches)
        statistics = (v for v in walk(*roots) if isinstance(REGISTRY.get(v.word), Statistic))
        return any(v.kind.stage >= earliest for v in statistics)

    @property
    def trained_views(self) -> frozenset[str]:
        """Views of the trained model that read anew and through which the loss's gradient flows, by text."""
        loss = self.checked.loss
        models = [] if loss is None else [a for v in carrying(loss) for a in v.arguments if a.kind.gradient]
        read = bindings(*(m for m in models if m.kind.element == Element.MODEL))
        return frozenset(n for n, value in read.items() if value.kind.gradient and value.word != "model")


def _is_reading(name: str) -> bool:
    return isinstance(REGISTRY.get(name), Reading)
