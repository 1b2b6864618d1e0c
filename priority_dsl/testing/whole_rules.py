"""Hypothesis strategies that write whole rules: declarations, weight, loss, normalize."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import assume
from hypothesis import strategies as st

from priority_dsl.api import check
from priority_dsl.checked import CheckedRule
from priority_dsl.diagnostics import PriorityError
from priority_dsl.kinds import Element
from priority_dsl.registry import REGISTRY
from priority_dsl.testing.drawing import BYTES, SAFE, Choices, Scope, Writer, statistics_of


@dataclass
class _Declaring:
    """The statements of a rule before its weight, and the names that they give."""

    lines: list[str] = field(default_factory=list)
    scope: Scope = field(default_factory=Scope)


def _declarations(choices: Choices, pairs: bool) -> _Declaring:
    made = _Declaring()
    writer = Writer(choices, made.scope)
    numbers: list[str] = []
    conditions: list[str] = ["(label == neg)", "(label in {neg, pos})"] if writer.odds(25) else []
    if writer.odds(10):
        made.lines += ['"""A rule that was drawn."""', 'cite "nowhere, Eq. (1)"']
    if writer.odds(40):
        made.lines.append(
            writer.one(("param tau = 0.5 in [0, 1]", "param tau = 2 in (0, inf)", "param tau = 1"))
        )
        numbers.append("tau")
    if writer.odds(25):
        made.lines.append('model teacher "a stronger model"')
    if writer.odds(25):
        extent = "" if pairs else writer.one(("", " per token", " per example"))
        made.lines.append(f"column score: number in {writer.one(('[0, 1]', '(0, inf)', '[-2, 2]'))}{extent}")
        numbers.append("score")
    if writer.odds(25):
        made.lines.append(f"column marked: bool{writer.one(('', ' per token'))}")
        conditions.append("marked")
    if writer.odds(20):
        made.lines.append(
            f"column source: {writer.one(('category', '{web, book}'))}{writer.one(('', ' per token'))}"
        )
        conditions += ["(source == web)", "(source != book)", "(source not in {web, book})"]
    if pairs and writer.odds(50):
        made.lines.append("column agreed: number in [0, 2] per pair")
        numbers.append("agreed")
    models = ("on", "ref", "teacher") if any("teacher" in line for line in made.lines) else ("on", "ref")
    made.scope = Scope(models, tuple(numbers), tuple(conditions), pairs)
    return made


def _with_lets(choices: Choices, made: _Declaring, depth: int) -> None:
    for name in ("first", "second"):
        writer = Writer(choices, made.scope)
        if not writer.odds(20):
            return
        if writer.odds(25):
            made.lines.append(f"let {name} = {writer.condition(depth - 1)}")
            made.scope = replace(made.scope, conditions=(*made.scope.conditions, name))
        else:
            made.lines.append(f"let {name} = {writer.number(depth - 1)}")
            made.scope = replace(made.scope, numbers=(*made.scope.numbers, name))


def _loss(writer: Writer, depth: int, weighted: bool) -> str:
    """A loss with gradient, that reads `weight` where the rule has one."""
    known = [n for n in statistics_of(Element.NUMBER) if REGISTRY.statistic(n).differentiable]
    word = REGISTRY.statistic(writer.one(known))
    models = "on" if word.models == 1 else writer.one(("ref, on", "on, ref"))
    options = "".join(f", {n}=2" for n, kind in word.options.items() if kind.default is None)
    trained = writer.one(("nll(on)", f"{word.name}({models}{options})", f"{word.name}({models}{options})"))
    if writer.odds(20):  # both base and exponent carry gradient
        trained = f"{SAFE.format(trained)} ** tanh({writer.statistic(Element.NUMBER)})"
    factor = "weight" if weighted else writer.number(depth - 1)
    form = writer.one(("{f} * {t}", "{f} * {t} + {n}", "{f} * ({t} - {n})", "({t} if {c} else {f} * nll_on)"))
    text = form.format(f=factor, t=trained, n=writer.number(depth - 1), c=writer.condition(depth - 1))
    return (
        f"{text} + nll(on) * {writer.one(('weight', 'weight ** 2'))}"
        if weighted and writer.odds(20)
        else text
    )


def _of_pairs(writer: Writer, depth: int, weighted: bool) -> str:
    """A loss of a pair that compares its responses, or one of a token."""
    if writer.odds(25):
        return _loss(writer, depth, weighted)
    factor = "weight * " if weighted else writer.one(("", "sg(p_on) * ", "score * ", "nll_ref * "))
    factor = factor if factor != "score * " or "score" in writer.scope.numbers else ""
    trained = [f"sum({factor}{writer.one(('logratio(on, ref)', 'nll_on', 'kl(ref, on)'))}, example)"]
    trained.append(f"mean({factor}{writer.one(('logp_on', 'H_on', 'nll_on'))}, example)")
    d = writer.one((trained[0], trained[0], trained[1], f"({trained[0]} - {trained[1]})"))
    gap = f"(chosen({d}) - rejected({d}))"
    text = writer.one((f"-log_sigmoid(0.5 * {gap})", f"(1 - 0.5 * {gap}) ** 2", f"max(0, 1 - {gap})"))
    if writer.odds(30):
        text = f"{text} + {writer.of_pair(d)}"
    if writer.odds(30):
        text = f"{text} * {writer.of_pair(writer.of_example(depth - 1))}"
    return text if not writer.odds(30) else f"({text} if {writer.condition(0)} else {writer.of_pair(d)})"


def _rule(choices: Choices, depth: int, pairs: bool) -> str:
    made = _declarations(choices, pairs)
    _with_lets(choices, made, depth)
    writer = Writer(choices, made.scope)
    what = writer.one(("weight", "weight", "bare", "if", "both", "loss"))
    if what in ("weight", "both"):
        made.lines.append(f"weight = {writer.number(depth)}")
    if what in ("both", "loss"):
        of = _of_pairs if pairs else _loss
        made.lines.append(f"loss = {of(writer, depth, weighted=what == 'both')}")
    over = ["over = all"] if writer.odds(15) else []
    if writer.odds(60):
        groups = f"groups({writer.condition(1)})"
        made.lines.append(
            f"normalize = {writer.one(('tokens', 'kept', 'weights', 'none', 'examples', groups))}"
        )
    if what == "if":
        made.lines.append(f"{writer.number(depth - 1)} if {writer.condition(depth - 1)}")
    if what == "bare":
        alone = writer.number(depth)  # a single word would be the name of a library rule
        made.lines.append(f"({alone})" if alone.isidentifier() else alone)
    if not any("unprompted(" in line for line in made.lines):  # which says nothing of the prompt's tokens
        made.lines[-1:-1] = over
    return writer.one(("\n", "; ")).join(made.lines)


@st.composite
def checked_rules(draw: st.DrawFn, *, depth: int = 3, pairs: bool = False) -> CheckedRule:
    """Whole rules as `rules` draws them, already checked."""
    text = _rule(Choices(draw(BYTES)), depth, pairs)
    try:
        return check(text)
    except PriorityError as error:
        if {d.code for d in error.diagnostics} != {"PD309"}:  # never a number, such as 1 / 0
            raise
        assume(False)
        raise


def rules(*, depth: int = 3, pairs: bool = False) -> st.SearchStrategy[str]:
    """Texts of whole rules that check: params, models, columns, lets, weight, loss, normalize, over.

    Four in five and more read a statistic of a model. With `pairs`, most compare the responses of pairs.

    >>> from hypothesis import given
    >>> from priority_dsl import format_rule, parse
    >>> @given(rules())
    ... def test_prints(text):
    ...     assert parse(format_rule(parse(text))) == parse(text)
    >>> test_prints()
    """
    return checked_rules(depth=depth, pairs=pairs).map(lambda checked: checked.source.text)
