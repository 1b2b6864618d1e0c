"""Countdown, a task small enough to learn in seconds and to check exactly.

A row is `3 7 5 > 26 :` (three numbers and a target) followed by `3 * 7 = 21 ; 21 + 5 = 26`: two steps of
arithmetic that use each number once, the second starting from the first one's result. Most problems have
several solutions, so that Pass@k measures whether a model still knows more than one. Every row is 18 tokens
with its end token, so nothing is ever padded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, permutations, product
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBERS = range(1, 13)
RESULTS = range(150)
"""What a step may result in; it covers every product of two numbers."""
OPERATORS = ("*", "+", "-")
SIGNS = ("=", ";", ">", ":")
END, PAD, UNKNOWN = "<end>", "<pad>", "<unknown>"
WORDS = (END, PAD, UNKNOWN, *SIGNS, *OPERATORS, *map(str, RESULTS))
"""The vocabulary, in the order of its token ids."""
ROW_TOKENS = 18
RESPONSE_TOKENS = 12
"""Tokens of a response, its end token included."""


@dataclass(frozen=True)
class Problem:
    """Three numbers in the order they are shown, and the target to reach."""

    numbers: tuple[int, int, int]
    target: int

    @property
    def prompt(self) -> str:
        """The problem as text: `3 7 5 > 26 :`."""
        return f"{' '.join(map(str, self.numbers))} > {self.target} :"

    @property
    def held_out(self) -> bool:
        """Whether the problem is kept for evaluation, whatever order its numbers are shown in.

        A tenth of all problems is; neither the base model nor a fine-tuning run is ever shown one of them.
        """
        key = f"{sorted(self.numbers)} {self.target}"
        return crc32(key.encode()) % 10 == 0


@dataclass(frozen=True)
class Chain:
    """Two steps `x first y = middle ; middle second z = result`; the results are whatever is claimed."""

    x: int
    first: str
    y: int
    middle: int
    second: str
    z: int
    result: int

    @property
    def text(self) -> str:
        """The chain as a response: `3 * 7 = 21 ; 21 + 5 = 26`."""
        return (
            f"{self.x} {self.first} {self.y} = {self.middle} ; "
            f"{self.middle} {self.second} {self.z} = {self.result}"
        )


def calculate(left: int, operator: str, right: int) -> int:
    """`left operator right` for one of `OPERATORS`; ValueError for any other operator."""
    if operator == "*":
        return left * right
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    raise ValueError(f"`{operator}` is not one of {', '.join(OPERATORS)}")


@cache
def chains(numbers: tuple[int, int, int]) -> tuple[Chain, ...]:
    """Every right chain over the three numbers whose results stay in `RESULTS`, in the fixed solution order.

    The order is that of a person who always works the same way: largest number first, products before sums
    before differences. It does not depend on the order in which the numbers are given.
    """
    found = []
    orders = sorted(set(permutations(numbers)), reverse=True)
    for (first, second), (x, y, z) in product(product(OPERATORS, OPERATORS), orders):
        middle = calculate(x, first, y)
        result = calculate(middle, second, z)
        if middle in RESULTS and result in RESULTS:
            found.append(Chain(x, first, y, middle, second, z, result))
    return tuple(found)


def solutions(problem: Problem) -> list[Chain]:
    """The right chains that reach the problem's target, in the fixed solution order; there may be none."""
    return [chain for chain in chains(problem.numbers) if chain.result == problem.target]


def solves(problem: Problem, response: str) -> bool:
    """Whether the response is a right chain over exactly the problem's numbers that reaches its target.

    Words are separated by spaces. Anything malformed (a missing word, words after the chain, a number written
    with a leading zero, an end token left in the text) does not solve the problem; nothing raises.
    """
    return any(response.split() == chain.text.split() for chain in solutions(problem))


def right(response: str, reference: str, row: Mapping[str, object]) -> bool:
    """Whether a response solves the problem of its row: the checker of `priority eval`.

    Any solution counts, not the reference's alone. A prompt of another form is a ValueError.
    """
    words = str(row["prompt"]).split()
    if len(words) != 6 or words[3] != ">" or words[5] != ":":
        raise ValueError(f"the prompt {row['prompt']!r} is not like `3 7 5 > 26 :`")
    x, y, z, target = (int(word) for word in (*words[:3], words[4]))
    return solves(Problem((x, y, z), target), response)


def draw_problems(held_out: bool, seed: int) -> Iterator[Problem]:
    """Solvable problems without end, from the held-out tenth or from the rest; the same for the same seed.

    The numbers are uniform and the target is the result of a chain drawn uniformly.
    """
    chance = random.Random(seed)
    while True:
        numbers = (chance.choice(NUMBERS), chance.choice(NUMBERS), chance.choice(NUMBERS))
        problem = Problem(numbers, chance.choice(chains(numbers)).result)
        if problem.held_out == held_out:
            yield problem


def held_out_problems(count: int, seed: int) -> list[Problem]:
    """`count` different held-out problems, none of them the same numbers and target in another order."""
    kept: dict[tuple[tuple[int, ...], int], Problem] = {}
    for problem in draw_problems(held_out=True, seed=seed):
        if len(kept) == count:
            break
        kept.setdefault((tuple(sorted(problem.numbers)), problem.target), problem)
    return list(kept.values())


def spoil(chain: Chain, chance: random.Random) -> Chain:
    """The chain made wrong by somebody who writes the wanted result whatever the sums say.

    Either the first result is a little off and the rest stands, or another chain over the same numbers, one
    that does not get there, claims the result.
    """
    strays = [other for other in chains((chain.x, chain.y, chain.z)) if other.result != chain.result]
    if strays and chance.random() < 0.5:
        return replace(chance.choice(strays), result=chain.result)
    near = range(chain.middle - 10, chain.middle + 11)
    return replace(chain, middle=chance.choice([n for n in near if n in RESULTS and n != chain.middle]))


def demonstrations(count: int, noise: float, seed: int) -> list[dict[str, str]]:
    """Rows that show the first solution in the fixed order, a share `noise` of them spoilt.

    Fields `prompt`, `completion`, and `quality` (`right` or `wrong`), which no built-in method reads.
    """
    chance = random.Random(seed)
    rows = []
    for problem in islice(draw_problems(held_out=False, seed=seed), count):
        chain, quality = solutions(problem)[0], "right"
        if chance.random() < noise:
            chain, quality = spoil(chain, chance), "wrong"
        rows.append({"prompt": problem.prompt, "completion": chain.text, "quality": quality})
    return rows


def practice(reaching: float, seed: int) -> Iterator[dict[str, str]]:
    """Rows for the base model, without end: any right chain, a share `reaching` of them reaching the target.

    The others are drawn uniformly from the chains over the numbers, so that a few of them reach it too.
    """
    chance = random.Random(seed)
    for problem in draw_problems(held_out=False, seed=seed):
        pool: Sequence[Chain] = chains(problem.numbers)
        if chance.random() < reaching:
            pool = solutions(problem)
        yield {"prompt": problem.prompt, "completion": chance.choice(pool).text}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the 160 words of the task, split at spaces; its text comes back with spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbered = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=ROW_TOKENS,
    )
