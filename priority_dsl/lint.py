"""What a rule is likely to do that its author may not want: warnings, each with a place and a way out."""

from __future__ import annotations

from priority_dsl import nodes
from priority_dsl.checked import CheckedRule
from priority_dsl.declarations import Declarations, Findings
from priority_dsl.diagnostics import Span
from priority_dsl.folding import fold, known_range
from priority_dsl.kinds import Stage
from priority_dsl.values import carrying

PROBABILISTIC = frozenset({"p", "mass", "entropy", "topk_entropy", "pmax"})


def examine(checked: CheckedRule, findings: Findings, declared: Declarations) -> None:
    """Note every warning that needs the whole rule."""
    _constant_weight(checked, findings)
    _ascent(checked, findings)
    _empty_selection(checked, findings)
    _gradient_through_probabilities(checked, findings)
    _never_varying(checked, findings)
    _unused(checked, findings, declared)


def _place(checked: CheckedRule, kind: type[nodes.Weight] | type[nodes.Loss]) -> Span | None:
    return next((s.value.span for s in checked.tree.statements if isinstance(s, kind)), None)


def _constant_weight(checked: CheckedRule, findings: Findings) -> None:
    if checked.loss is None and checked.weight.kind.stage == Stage.CONSTANT:
        value = fold(checked.weight, {n: p.value for n, p in checked.params.items()})
        if value != 1:
            what = "nothing is trained" if value == 0 else "it only scales the learning rate"
            findings.warn(
                "PD402", f"the weight is the constant {value:g}", _place(checked, nodes.Weight), what,
                "let it read a statistic or a column, or write 1",
            )  # fmt: skip


def _ascent(checked: CheckedRule, findings: Findings) -> None:
    if checked.range.low < 0 and (checked.loss is None or not checked.loss.kind.range.low > float("-inf")):
        findings.warn(
            "PD401", f"the weight can be negative ({checked.range}) and the loss has no lower bound",
            _place(checked, nodes.Weight), "ascent on these tokens never ends",
            "use a small negative weight, a schedule, or a bounded loss such as `weight * p(on)`",
        )  # fmt: skip


def _empty_selection(checked: CheckedRule, findings: Findings) -> None:
    selects = checked.range.is_boolean and checked.range.contains(0.0)
    if checked.normalize in ("kept", "weights") and selects and not _keeps_some(checked):
        findings.warn(
            "PD403", "the selection can be empty, and so can its denominator", _place(checked, nodes.Weight),
            f"normalize = {checked.normalize}", "such a step trains nothing; `normalize = tokens` does not",
        )  # fmt: skip


def _keeps_some(checked: CheckedRule) -> bool:
    """Whether the weight is a largest share of the step that is rounded up: some of its tokens are kept."""
    value = checked.weight
    while value.word in ("indicator", "sg"):
        value = value.arguments[0]
    if value.word not in ("top", "bottom") or len(value.arguments) > 2:
        return False
    written = list(value.arguments)[1]
    share = known_range(written, {n: p.value for n, p in checked.params.items()})
    return value.option("scope") == "batch" and value.option("round") == "ceil" and share.low > 0


def _gradient_through_probabilities(checked: CheckedRule, findings: Findings) -> None:
    for value in carrying(checked.loss) if checked.loss is not None else ():
        if value.word == "multiply" and all(a.kind.gradient for a in value.arguments):
            read = [p.word for a in value.arguments for p in carrying(a) if p.word in PROBABILISTIC]
            if read:
                findings.warn(
                    "PD407", f"gradient flows through `{read[0]}` and through what it multiplies", value.span,
                    "another method than a weight", "make the factor the `weight`, or wrap it in `sg(...)`",
                )  # fmt: skip


def _never_varying(checked: CheckedRule, findings: Findings) -> None:
    for column in checked.columns.values():
        single = column.range.point is not None or (column.closed and len(column.categories) == 1)
        if column.name in checked.requires.columns and single:
            findings.warn(
                "PD406", f"the column `{column.name}` can take a single value and never varies", column.span,
                "one value", "declare all of its values",
            )  # fmt: skip


def _unused(checked: CheckedRule, findings: Findings, declared: Declarations) -> None:
    spans = {
        n: d.span for group in (checked.params, checked.models, checked.columns) for n, d in group.items()
    }
    for name, span in {**spans, **declared.let_spans}.items():
        if name not in declared.used and span is not None:
            findings.warn(
                "PD408", f"`{name}` is declared and never read", span, "unused", "use it or remove it"
            )
