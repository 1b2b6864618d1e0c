"""Tree to text and back, JSON and back, and the shape of the canonical text."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from pydantic import ValidationError

from priority_dsl import nodes
from priority_dsl.diagnostics import PriorityError
from priority_dsl.nodes import Rule
from priority_dsl.parser import parse
from priority_dsl.printer import format_expression, format_rule
from tests import trees


@settings(max_examples=150)
@given(trees.rules())
def test_a_printed_tree_parses_back(rule: Rule):
    text = format_rule(rule)
    assert parse(text) == rule
    assert format_rule(text) == text


@settings(max_examples=150)
@given(trees.expressions)
def test_a_printed_expression_parses_back(expression):
    text = format_expression(expression)
    assert "\n" not in text
    assert parse(f"loss = {text}").statements[0].value == expression


@settings(max_examples=100)
@given(trees.rules())
def test_json_there_and_back(rule: Rule):
    text = rule.model_dump_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert Rule.model_validate_json(text) == rule
    assert Rule.model_validate(rule.model_dump()) == rule


@settings(max_examples=100)
@given(trees.expressions)
@example(parse("(a + b) * c").statements[0].value)
def test_no_bracket_is_superfluous(expression):
    """Taking any one pair of brackets away breaks the text or changes the tree."""
    text = format_expression(nodes.Unary(op="-", operand=expression))
    for without in _one_pair_less(text):
        try:
            other = parse(f"loss = {without}").statements[0].value
        except PriorityError:
            continue
        assert other.operand != expression if isinstance(other, nodes.Unary) else True, (text, without)


def _one_pair_less(text: str) -> list[str]:
    """The text without each pair of brackets that is no call's, strings left alone."""
    opened, results, inside = [], [], False
    for place, c in enumerate(text):
        if c == '"' and text[place - 1] != "\\":
            inside = not inside
        elif c == "(" and not inside:
            opened.append(place)
        elif c == ")" and not inside:
            start = opened.pop()
            before = text[:start]
            last = before.rsplit(" ", 1)[-1].lstrip("(-")
            if not (last and (last[-1].isalnum() or last[-1] == "_")) or last in ("not", "and", "or"):
                results.append(before + text[start + 1 : place] + text[place + 1 :])
    return results


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("mass( ref )>=0.5", "mass(ref) >= 0.5"),
        ("(a)", "(a)"),  # bare, `a` would be read as the name of a library rule
        ("a", "(a)"),
        ("weight = (a)", "weight = a"),
        ("1", "1"),
        ("inf", "inf"),
        ("1.0", "1"),
        (".5+5.", "0.5 + 5"),
        ("1e-9", "1e-09"),
        ("1e999", "inf"),
        ("((a+b))*c-(d-e)", "(a + b) * c - (d - e)"),
        ("a+(b+c)", "a + (b + c)"),
        ("(a+b)+c", "a + b + c"),
        ("(a**b)**c**d", "(a ** b) ** c ** d"),
        ("-x**-y**2", "-x ** -y ** 2"),
        ("(-x)**2", "(-x) ** 2"),
        ("- - x", "--x"),
        ("-(a*b)", "-(a * b)"),
        ("(-a)*b", "-a * b"),
        ("not(a)and(not(b==c))", "not a and not b == c"),
        ("(not a)==b", "(not a) == b"),
        ("(a<b)<c", "(a < b) < c"),
        ("a<b<=c!=d", "a < b <= c != d"),
        ("(x in {a})==(y not in{b,\"c d\",-1,})", '(x in {a}) == (y not in {b, "c d", -1})'),
        ("a if b else(c if d else e)", "a if b else c if d else e"),
        ("(a if b else c)if d else e", "(a if b else c) if d else e"),
        ("a if(b if c)else d if e", "a if (b if c) else d if e"),
        ("f()+f(a,)+f(k=1,)+f(a if b,k=(c))", "f() + f(a) + f(k=1) + f(a if b, k=c)"),
        (r'span("a\"b\d#")', r'span("a\"b\d#")'),
        ("-1 if label == neg", "-1 if label == neg"),
        ("weight == 1", "weight == 1"),
        ("param a=-1in(-inf,1e3];weight=a", "param a = -1 in (-inf, 1000]\nweight = a\n"),
        ('column x:{a,"b c","if",}per token;1', 'column x: {a, "b c", "if"} per token\n1\n'),
        ("column x : number in [0,1) per example;1", "column x: number in [0, 1)\n1\n"),
        ('model m "w";model s=ema(.5);1', 'model m "w"\nmodel s = ema(0.5)\n1\n'),
        ("over=all;normalize=groups((a));keep=b", "over = all\nnormalize = groups(a)\nkeep = b\n"),
        ('"""d\r\ne""";cite"x" ;1', '"""d\ne"""\ncite "x"\n1\n'),
        ("\ufeffa + b # c \r\n\r\n\t# d\r", "a + b  # c\n# d\n"),
        ("# a\n\n# b\nlet x = f( # c\n 1) # d\n1", "# a\n# b\n# c\nlet x = f(1)  # d\n1\n"),
        ("let x = 1\n\n# e\nx # f\n  # g\n", "let x = 1\n# e\nx  # f\n# g\n"),
        ("let x = 1; weight = x # both", "let x = 1\nweight = x  # both\n"),
        ("let x = 1; # first\nweight = x", "let x = 1  # first\nweight = x\n"),
    ],
)  # fmt: skip
def test_canonical_text(text: str, canonical: str):
    assert format_rule(text) == canonical
    assert format_rule(canonical) == canonical
    assert parse(canonical) == parse(text)


def test_only_a_file_ends_with_a_line_end():
    assert not format_rule("mass(ref) >= 0.5").endswith("\n")
    assert not format_rule("weight = p_on").endswith("\n")
    assert format_rule("mass(ref) >= 0.5 # why").endswith("# why\n")
    assert format_rule("over = all; p_on").endswith("p_on\n")


WEIGHT = nodes.Weight(value=nodes.Number(value=1))
BARE = nodes.Weight(value=nodes.Number(value=1), bare=True)
DOC = nodes.Doc(text="d")
X = nodes.Name(name="x")


@pytest.mark.parametrize(
    "build",
    [
        lambda: Rule(statements=()),
        lambda: Rule(statements=(DOC,)),
        lambda: Rule(statements=(WEIGHT, WEIGHT)),
        lambda: Rule(statements=(BARE, nodes.Loss(value=X))),
        lambda: Rule(statements=(WEIGHT, DOC)),
        lambda: nodes.Name(name="inf"),
        lambda: nodes.Name(name="loss"),
        lambda: nodes.Name(name="τ"),
        lambda: nodes.Name(name="True"),
        lambda: nodes.Call(function="weight"),
        lambda: nodes.Keyword(name="weight", value=X),
        lambda: nodes.Let(name="weight", value=X),
        lambda: nodes.Param(name="batch", default=1),
        lambda: nodes.Param(name="x", default=float("nan")),
        lambda: nodes.Number(value=-1),
        lambda: nodes.Number(value=-0.0),
        lambda: nodes.Number(value=float("nan")),
        lambda: nodes.String(value="a\\"),
        lambda: nodes.String(value="a\nb"),
        lambda: nodes.String(value="\ud800"),
        lambda: nodes.Doc(text='a"'),
        lambda: nodes.Doc(text='a"""b'),
        lambda: nodes.Compare(ops=("<",), operands=(X,)),
        lambda: nodes.Membership(operand=X, members=()),
        lambda: nodes.Membership(operand=X, members=(nodes.Unary(op="-", operand=X),)),
        lambda: nodes.Membership(operand=X, members=(nodes.Call(function="f"),)),
        lambda: nodes.Model(name="m"),
        lambda: nodes.Model(name="m", description="d", value=X),
        lambda: nodes.Column(name="c", type="bool", values=("a",)),
        lambda: nodes.Column(name="c", type="category", values=()),
        lambda: nodes.Column(name="c", type="bool", bounds=nodes.Bounds(low=0, high=1)),
        lambda: nodes.Normalize(choice="groups"),
        lambda: nodes.Normalize(choice="tokens", by=X),
        lambda: nodes.Weight(value=X, comments=("no sign",)),
        lambda: nodes.Weight(value=X, trailing="# blank at the end "),
    ],
)
def test_a_tree_that_no_text_can_say_does_not_validate(build):
    with pytest.raises(ValidationError):
        build()


def test_a_tree_too_deep_to_parse_does_not_validate():
    def nested(levels: int) -> nodes.Expr:
        tree: nodes.Expr = X
        for _ in range(levels - 1):
            tree = nodes.Unary(op="not", operand=tree)
        return tree

    deepest = Rule(statements=(nodes.Loss(value=nested(99)),))
    assert parse(format_rule(deepest)) == deepest
    with pytest.raises(ValidationError, match="100 levels"):
        Rule(statements=(nodes.Loss(value=nested(100)),))


def test_json_of_any_depth_is_refused_without_a_crash():
    text = '{"kind":"unary","op":"-","operand":' * 5000 + '{"kind":"name","name":"x"}' + "}" * 5000
    with pytest.raises(ValidationError):
        Rule.model_validate_json('{"statements":[{"kind":"loss","value":' + text + "}]}")
