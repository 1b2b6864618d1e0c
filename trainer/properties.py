"""`priority test`: what every rule promises, on drawn batches, and its equality with a function by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from priority_dsl import PriorityError, compile_rule
from trainer.faults import ConfigFault, first_line
from trainer.functions import load_function

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


def run_tests(rules: list[str], values: Mapping[str, float], against: str | None) -> int:
    """Test each rule and print a line a property; 1 if one does not hold, else 0.

    `against` names a function `module:function` that computes by hand the weights, or the loss of each token
    where the rule gives a loss. Raises `ConfigFault` where hypothesis is not installed.
    """
    try:
        from priority_dsl.testing import PROPERTIES, counterexample
    except ImportError as error:
        raise ConfigFault("`priority test` needs hypothesis: pip install 'priority_dsl[testing]'") from error
    by_hand = load_function("--against", against) if against is not None else None
    failed = False
    for argument in rules:
        rule = compile_rule(argument, **values)
        print(f"{argument.strip()}: {rule.regime}, weights in {rule.range}")
        for name, holds in PROPERTIES.items():
            failed |= _tell(name, counterexample(rule, holds))
        if by_hand is not None:
            failed |= _tell(f"equals {against}", _difference(rule, by_hand))
    return 1 if failed else 0


def _tell(name: str, failure: str | None) -> bool:
    """Print how a property fared; whether it failed."""
    if failure is None:
        print(f"  ok    {name}")
        return False
    print(f"  FAIL  {name}")
    print("\n".join("        " + line for line in failure.splitlines()))
    return True


def _difference(rule: CompiledRule, by_hand: Callable[..., Any]) -> str | None:
    from priority_dsl.testing import assert_equivalent

    try:
        assert_equivalent(rule, by_hand, of="weights" if rule.checked.loss is None else "loss")
    except AssertionError as error:
        return str(error)
    except PriorityError:
        raise
    except Exception as error:  # the person's own function may raise anything
        return f"the function stopped: {type(error).__name__}: {first_line(error)}"
    return None
