"""Whether a sampled response is right: exact checkers, no judgement."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

from trainer.functions import load_function

# Takes the response, the reference response and the fields of the row; says whether the response is right.
Checker = Callable[[str, str, Mapping[str, object]], bool]
FINAL = re.compile(r"####\s*(-?[$]?[\d,]*\.?\d+)")


def exact(response: str, reference: str, row: Mapping[str, object]) -> bool:
    """Whether the response is the reference, white space at both ends aside."""
    return response.strip() == reference.strip()


def gsm8k(response: str, reference: str, row: Mapping[str, object]) -> bool:
    """Whether the number after the last `####` is the reference's; a response without one is wrong."""
    found, wanted = final_number(response), final_number(reference)
    return found is not None and found == wanted


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, without dollar sign and thousands separators; None without one."""
    numbers = FINAL.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "").replace("$", "")) if numbers else None
    except InvalidOperation:
        return None


CHECKERS: dict[str, Checker] = {"exact": exact, "gsm8k": gsm8k}


def find_checker(name: str) -> Checker:
    """The checker of that name, or a person's own as `module:function`."""
    return CHECKERS[name] if name in CHECKERS else load_function("--checker", name)
