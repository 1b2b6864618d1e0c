"""The library's rules about pairs of responses once more, by hand in torch, straight from their formulas.

Nothing here imports priority_dsl. A problem has P pairs: of each the responses as rows 2 * i (chosen) and
2 * i + 1 (rejected) of logits [2P, T, V] and targets [2P, T]. A twin returns the loss of each pair [P].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.rules.by_hand import IGNORED, at_target

MODELS = ("ref", "positive", "negative", "teacher")


@dataclass(frozen=True)
class Problem:
    logits: Tensor
    targets: Tensor
    models: dict[str, Tensor]
    h: Tensor  # [2P] whether a response hallucinates

    def log_ratio(self, a: str, b: str) -> Tensor:
        """log a(y) - log b(y) of each target [2P, T], 0 where ignored; the gradient goes through `on`."""
        models = {**self.models, "on": self.logits}
        difference = self.log_probability(models[a]) - self.log_probability(models[b])
        return difference * (self.targets != IGNORED)

    def log_probability(self, logits: Tensor) -> Tensor:
        return at_target(logits.double().log_softmax(-1), self.targets)


def draw(seed: int, dtype: torch.dtype = torch.float64, pairs: int = 3) -> Problem:
    """Pairs of responses of different lengths, some tokens in them ignored, logits that tie."""
    random = torch.Generator().manual_seed(seed)
    shape = (2 * pairs, 6)
    targets = torch.randint(11, shape, generator=random)
    ignored = torch.rand(shape, generator=random) < 0.3
    ignored[:, 2] = False  # every response has a token
    logits, *models = (2 * torch.randn(*shape, 11, generator=random).to(dtype) for _ in range(5))
    logits[0, :3] = logits[0, :3].round()
    models[2][1] = models[1][1]  # the two contrastive models agree on a response
    hallucinates = torch.rand(2 * pairs, generator=random) < 0.5
    return Problem(
        logits.requires_grad_(),
        targets.masked_fill(ignored, IGNORED),
        dict(zip(MODELS, models, strict=True)),
        hallucinates,
    )


def preference(beta: float, won: Tensor, lost: Tensor) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected)) of each pair, from a sum for each response [2P]."""
    return -torch.nn.functional.logsigmoid(beta * (won[0::2] - lost[1::2]))


def twin_dpo(given: Problem, *, beta: float) -> Tensor:
    d = given.log_ratio("on", "ref").sum(-1)
    return preference(beta, d, d)


twin_factuality_preference = twin_dpo


def weighted(given: Problem, odds: Tensor, beta: float, k: float, mu: float) -> Tensor:
    ratio = given.log_ratio("on", "ref")
    won = (k * (mu * odds).exp() * ratio).sum(-1)
    lost = (k * (-mu * odds).exp() * ratio).sum(-1)
    return preference(beta, won, lost)


def twin_tis_dpo(given: Problem, *, beta: float, k: float, mu: float, low: float, high: float) -> Tensor:
    return weighted(given, given.log_ratio("positive", "negative").clamp(low, high), beta, k, mu)


def twin_swift(given: Problem, *, beta: float, k: float, mu: float) -> Tensor:
    return weighted(given, given.log_ratio("teacher", "ref").clamp(-0.5, 1.5), beta, k, mu)


def twin_fdpo(given: Problem, *, beta: float, lam: float) -> Tensor:
    """As the paper says it: first turn the pairs round, then DPO with a margin where factuality differs."""
    d, losses = given.log_ratio("on", "ref").sum(-1), []
    for i in range(len(given.h) // 2):
        winner, loser = 2 * i, 2 * i + 1
        if given.h[winner] and not given.h[loser]:
            winner, loser = loser, winner
        margin = lam * (int(given.h[loser]) - int(given.h[winner]))
        losses.append(-torch.nn.functional.logsigmoid(beta * (d[winner] - d[loser] - margin)))
    return torch.stack(losses)


def contrastive_score(given: Problem) -> Tensor:
    """s of Critical Tokens Matter: the probability under twice the positive minus the negative logits."""
    contrast = 2 * given.models["positive"].double() - given.models["negative"].double()
    return given.log_probability(contrast).exp()


def twin_cdpo(given: Problem, *, beta: float) -> Tensor:
    s, ratio = contrastive_score(given), given.log_ratio("on", "ref")
    return preference(beta, (s * ratio).sum(-1), ((1 - s) * ratio).sum(-1))


def twin_critical_token(given: Problem, *, beta: float) -> Tensor:
    s, ratio = contrastive_score(given), given.log_ratio("on", "ref")
    return preference(beta, ratio.sum(-1), ((1 - s) * ratio).sum(-1))


PAIRS: dict[str, Callable[..., Tensor]] = {
    name.removeprefix("twin_"): twin for name, twin in list(globals().items()) if name.startswith("twin_")
}
