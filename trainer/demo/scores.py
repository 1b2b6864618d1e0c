"""What a countdown model can do: Avg and Pass@k of its samples, its entropy, and its KL to the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.demo.countdown import RESPONSE_TOKENS, Problem, solves
from trainer.evaluate import mean_pass_at_k
from trainer.sampling import sample, token_figures

SAMPLES = 32
"""Responses drawn to each problem, at temperature 1."""
SPREAD_SAMPLES = 8
"""Of these, how many a problem the entropy and the KL are taken over: 18,000 tokens are plenty for a mean."""
BATCH = 2048


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model scored: `passes[k - 1]` is Pass@k in percent; `entropy` and `kl` are nats a token.

    `kl` is KL(model || base) over the model's own samples.
    """

    passes: tuple[float, ...]
    entropy: float
    kl: float

    @property
    def avg(self) -> float:
        """The share of all samples that solve their problem, in percent."""
        return self.passes[0]

    def pass_at(self, k: int) -> float:
        """The share of problems that one of k samples solves, in percent; k from 1 to `SAMPLES`."""
        return self.passes[k - 1]

    def as_json(self) -> dict[str, float]:
        """The figures of `demo_results.json`: percent, and nats a token."""
        return {
            "avg": self.avg,
            **{f"pass_at_{k}": self.pass_at(k) for k in (4, 16, 32)},
            "entropy": self.entropy,
            "kl": self.kl,
        }


def measure(model: Any, base: Any, tokenizer: Any, problems: Sequence[Problem], seed: int) -> Scores:
    """Draw `SAMPLES` responses to each problem and measure them; the same seed gives the same scores."""
    drawn = sample(
        model,
        tokenizer,
        [problem.prompt for problem in problems],
        SAMPLES,
        max_new_tokens=RESPONSE_TOKENS,
        batch_size=BATCH,
        seed=seed,
    )
    correct = [
        sum(solves(problem, response.text) for response in responses)
        for problem, responses in zip(problems, drawn, strict=True)
    ]
    some = [response for responses in drawn for response in responses[:SPREAD_SAMPLES]]
    spread = token_figures(model, some, base, batch_size=BATCH)
    assert spread.kl is not None, "a base is given"
    passes = tuple(100 * mean_pass_at_k(correct, SAMPLES, k) for k in range(1, SAMPLES + 1))
    return Scores(passes, spread.entropy, spread.kl)
