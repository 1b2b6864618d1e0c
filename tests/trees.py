"""Hypothesis strategies for syntax trees: everything that validates, whether it means something or not."""

from __future__ import annotations

from hypothesis import strategies as st

from priority_dsl import nodes
from priority_dsl.nodes import RESERVED, SCOPES

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\n\r")

declared = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,7}", fullmatch=True).filter(lambda n: n not in RESERVED)
words = declared | st.sampled_from(sorted(SCOPES))  # functions and keyword arguments
identifiers = words | st.just("weight")
lines = st.text(CHARACTERS | st.sampled_from('"\\#'), max_size=12).filter(lambda t: not t.endswith("\\"))
comments = st.text(CHARACTERS, max_size=12).map(lambda t: f"#{t}".rstrip())
descriptions = st.text(CHARACTERS | st.sampled_from('"\\#\n'), max_size=20).filter(
    lambda t: '"""' not in t and not t.endswith('"')
)
magnitudes = st.floats(min_value=0, allow_nan=False).map(abs) | st.integers(0, 10**20).map(float)
signed = st.floats(allow_nan=False)

numbers = st.builds(nodes.Number, value=magnitudes)
strings = st.builds(nodes.String, value=lines)
names = st.builds(nodes.Name, name=identifiers)
members = numbers | strings | names | st.builds(nodes.Unary, op=st.just("-"), operand=numbers)


def _compound(inner):
    ops = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    chains = st.lists(ops, min_size=1, max_size=3).flatmap(
        lambda chosen: st.builds(
            nodes.Compare, ops=st.just(tuple(chosen)), operands=st.tuples(*[inner] * (len(chosen) + 1))
        )
    )
    keywords = st.builds(nodes.Keyword, name=words, value=inner)
    return st.one_of(
        st.builds(nodes.Unary, op=st.sampled_from(["-", "not"]), operand=inner),
        st.builds(
            nodes.Binary,
            op=st.sampled_from(["+", "-", "*", "/", "**", "and", "or"]),
            left=inner,
            right=inner,
        ),
        chains,
        st.builds(
            nodes.Membership,
            operand=inner,
            negated=st.booleans(),
            members=st.lists(members, min_size=1, max_size=3).map(tuple),
        ),
        st.builds(nodes.Conditional, then=inner, condition=inner, otherwise=st.none() | inner),
        st.builds(
            nodes.Call,
            function=words,
            arguments=st.lists(inner, max_size=3).map(tuple),
            keywords=st.lists(keywords, max_size=2).map(tuple),
        ),
    )


expressions = st.recursive(numbers | strings | names, _compound, max_leaves=15)

_above = {"comments": st.lists(comments, max_size=2).map(tuple), "trailing": st.none() | comments}
bounds = st.builds(nodes.Bounds, low=signed, high=signed, low_open=st.booleans(), high_open=st.booleans())
_per = {"per": st.sampled_from(["token", "example", "pair"])}
columns = st.one_of(
    st.builds(
        nodes.Column,
        name=declared,
        type=st.sampled_from(["bool", "number", "category", "text", "spans"]),
        **_per,
        **_above,
    ),
    st.builds(nodes.Column, name=declared, type=st.just("number"), bounds=bounds, **_per, **_above),
    st.builds(
        nodes.Column,
        name=declared,
        type=st.just("category"),
        values=st.lists(lines | identifiers, min_size=1, max_size=3).map(tuple),
        **_per,
        **_above,
    ),
)
declarations = st.one_of(
    st.builds(nodes.Cite, text=lines, **_above),
    st.builds(nodes.Param, name=declared, default=signed, bounds=st.none() | bounds, **_above),
    st.builds(nodes.Model, name=declared, description=lines, **_above),
    st.builds(nodes.Model, name=declared, value=expressions, **_above),
    st.builds(nodes.Let, name=declared, value=expressions, **_above),
    columns,
)
weights = st.builds(nodes.Weight, value=expressions, bare=st.booleans(), **_above)
losses = st.builds(nodes.Loss, value=expressions, **_above)
keeps = st.builds(nodes.Keep, value=expressions, **_above)
overs = st.builds(nodes.Over, choice=st.sampled_from(["response", "all"]), **_above)
normalizes = st.one_of(
    st.builds(
        nodes.Normalize, choice=st.sampled_from(["tokens", "kept", "weights", "none", "examples"]), **_above
    ),
    st.builds(nodes.Normalize, choice=st.just("groups"), by=expressions, **_above),
)
docs = st.builds(nodes.Doc, text=descriptions, **_above)


@st.composite
def rules(draw) -> nodes.Rule:
    """A whole rule: a description first, a bare weight last, the others in any order."""
    said = draw(st.lists(st.sampled_from([weights, losses, keeps]), min_size=1, max_size=3, unique=True))
    extra = draw(st.lists(st.sampled_from([overs, normalizes]), max_size=2, unique=True))
    body = [draw(strategy) for strategy in (*said, *extra)] + draw(st.lists(declarations, max_size=3))
    body = draw(st.permutations(body))
    body.sort(key=lambda s: isinstance(s, nodes.Weight) and s.bare)
    first = [draw(docs)] if draw(st.booleans()) else []
    return nodes.Rule(
        statements=tuple(first + body), comments=draw(st.lists(comments, max_size=2).map(tuple))
    )
