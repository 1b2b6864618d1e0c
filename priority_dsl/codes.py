"""The one table of codes: what each means, with a bad and a good example."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """What a code stands for: its title, one line of explanation, a text that has it and one that has not."""

    title: str
    explanation: str
    bad: str
    good: str


CODES: dict[str, Code] = {
    "PD101": Code(
        "unexpected character",
        "The language does not have this character outside strings and comments.",
        "mass(ref) >= 0.5 & p_on > 0.1",
        "mass(ref) >= 0.5 and p_on > 0.1",
    ),
    "PD102": Code(
        "unexpected word or sign",
        "The word or sign exists but cannot stand here, or the statement stops too early.",
        "2 p_on",
        "2 * p_on",
    ),
    "PD103": Code(
        "bracket without a partner",
        "A bracket is never closed, or a closing one closes nothing.",
        "max(p_on, 0.1",
        "max(p_on, 0.1)",
    ),
    "PD104": Code(
        "string without an end",
        'A string ends on its line with `"`, a description somewhere below with three of them.',
        'span("[0-9]+)',
        'span("[0-9]+")',
    ),
    "PD105": Code(
        "text too long",
        "A rule has at most 20,000 characters.",
        "weight = 1" + 20_000 * " ",
        "weight = 1",
    ),
    "PD106": Code(
        "too deep",
        "An expression has at most 100 levels, a chain of operators counts one for each.",
        "p_on" + 100 * " + p_ref",
        "p_on + 100 * p_ref",
    ),
    "PD107": Code(
        "reserved word as a name",
        "Keywords, scopes and `inf` cannot be the name of anything.",
        "param batch = 8; weight = p_on / batch",
        "param size = 8; weight = p_on / size",
    ),
    "PD108": Code(
        "statement repeated or out of place",
        "A description comes first, an expression alone comes last, and what says one thing is said once.",
        "weight = p_on; weight = p_ref",
        "weight = p_on * p_ref",
    ),
    "PD109": Code(
        "unknown choice",
        "Only a few words can stand here.",
        "over = prompt; weight = p_on",
        "over = all; weight = p_on",
    ),
    "PD112": Code(
        "empty rule",
        "A rule says something: a weight, a loss or what to keep.",
        "param tau = 0.5",
        "param tau = 0.5; weight = mass(ref) >= tau",
    ),
}
