"""Random small problems for the rules: logits of several models, targets, columns, and all that goes wrong.

Each draw holds ignored tokens, logits that tie (also at the top), tokens that are impossible (-inf) under
every model, a certain token, likely and unlikely targets, two tokens that are alike in everything a model
says (so that statistics tie), and positions where the frozen models agree, nearly agree or disagree with the
trained one. The examples are rows of a data set, in another order than in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXAMPLES, TOKENS, VOCABULARY = 4, 6, 29
FROZEN = ("ref", "other", "teacher", "rl", "curated", "warm", "early")


@dataclass(frozen=True)
class Draw:
    logits: Tensor
    targets: Tensor
    models: dict[str, Tensor]
    columns: dict[str, Any]
    progress: float
    rows: tuple[int, ...]  # the data-set row of each example
    seed: int
    epoch: int

    @property
    def examples(self) -> Tensor:
        """The data-set row of each token, like the targets."""
        return torch.tensor(self.rows).unsqueeze(-1).expand(self.targets.shape)

    def leaf(self) -> Tensor:
        """The trained model's logits, to differentiate by."""
        return self.logits.clone().requires_grad_()


def draw(seed: int, dtype: torch.dtype = torch.float64, impossible_target: bool = False) -> Draw:
    """One problem; with `impossible_target`, one supervised target has probability zero under every model."""
    random = torch.Generator().manual_seed(seed)
    shape = (EXAMPLES, TOKENS)
    targets = torch.randint(0, VOCABULARY, shape, generator=random)
    likely = 5 * torch.rand(*shape, 1, generator=random) * (torch.arange(VOCABULARY) == targets.unsqueeze(-1))
    online = 2 * torch.randn(*shape, VOCABULARY, generator=random) + likely
    models = {name: _frozen(online, random) for name in FROZEN}

    # The same tokens are impossible for all, else a divergence is infinite for good reasons.
    excluded = torch.rand(*shape, VOCABULARY, generator=random) < 0.15
    excluded[1, 1] = True  # only the target is left: a certain token
    excluded.scatter_(-1, targets.unsqueeze(-1), False)
    if impossible_target:
        excluded[2, 3] = False
        excluded[2, 3, targets[2, 3]] = True
    logits, *frozen = (
        z.masked_fill(excluded, -torch.inf).to(dtype) for z in (_with_ties(online, random), *models.values())
    )
    for z in (logits, *frozen):
        z[2, 5] = z[0, 1]
    targets[2, 5] = targets[0, 1]
    ignored = torch.rand(shape, generator=random) < 0.25
    ignored[3] |= seed % 3 == 0  # a row without a single supervised token
    ignored[1, 1] = ignored[2, 3] = ignored[2, 5] = ignored[0, 1] = False
    return Draw(
        logits,
        targets.masked_fill(ignored, -100),
        {**dict(zip(FROZEN, frozen, strict=True)), **_views(dict(zip(FROZEN, frozen, strict=True)))},
        {**_columns(random), "attention": torch.rand(shape, generator=random, dtype=torch.float64)},
        progress=torch.rand((), generator=random).item(),
        rows=tuple((3 + 2 * torch.randperm(EXAMPLES, generator=random)).tolist()),
        seed=seed - 2,
        epoch=seed % 4,
    )


def _views(models: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an average and views that read another prompt say: anything that is none of the models above."""
    return {
        "slow": models["early"],
        "reading(ref, perturbed_text)": models["warm"],
        "reading(on, perturbed_text)": models["rl"],
        "unprompted(ref)": models["other"],
    }


def _with_ties(logits: Tensor, random: torch.Generator) -> Tensor:
    rounded = torch.rand(logits.shape[:-1], generator=random) < 0.4
    return torch.where(rounded.unsqueeze(-1), logits.round(), logits)


def _frozen(online: Tensor, random: torch.Generator) -> Tensor:
    """Another model: a third of the positions has the same logits, a third close ones, the rest its own."""
    own = 2 * torch.randn(online.shape, generator=random)
    which = torch.randint(0, 3, online.shape[:-1], generator=random).unsqueeze(-1)
    mixed = torch.where(which == 0, online, torch.where(which == 1, online + 0.1 * own, own))
    return _with_ties(mixed, random)


def _columns(random: torch.Generator) -> dict[str, Any]:
    """Values in the ranges that the rules declare, as the lists and tensors that users have."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64)

    def quarters(*shape: int) -> Tensor:
        return (4 * rand(*shape)).round() / 4

    return {
        "label": ["pos" if v < 0.5 else "neg" for v in rand(EXAMPLES).tolist()],
        "made_up": (rand(EXAMPLES) < 0.5).tolist(),
        "factual": (rand(EXAMPLES, TOKENS) < 0.6).tolist(),
        "noise": 2 * rand(EXAMPLES),
        "utility": 3 * rand(EXAMPLES, TOKENS),
        "budget": 0.1 + rand(EXAMPLES, TOKENS),
        "passes": rand(EXAMPLES) < 0.7,
        "score": [0.5, *rand(EXAMPLES - 1).tolist()],  # 0.5 is not above a threshold of 0.5
        "key_answer": rand(EXAMPLES, TOKENS) < 0.4,
        "learned_early": (rand(EXAMPLES, TOKENS) < 0.5).tolist(),
        "memorised": (rand(EXAMPLES, TOKENS) < 0.5).tolist(),
        "impact": quarters(EXAMPLES, TOKENS) - 0.5,  # some are exactly 0
        "behaviour_logp": -3 * rand(EXAMPLES, TOKENS),
        "difficulty": [round(v) for v in (4 * rand(EXAMPLES) - 2).tolist()],  # some are equal
        "influence": quarters(EXAMPLES) - 0.5,
        "predicted_loss": 2 * quarters(EXAMPLES),
        "relabelled": (rand(EXAMPLES) < 0.7).tolist(),
        "uncertainty": quarters(EXAMPLES),
        "response": (
            torch.arange(TOKENS) >= torch.randint(0, TOKENS, (EXAMPLES, 1), generator=random)
        ).tolist(),
        'span("<answer>(.*?)</answer>")': rand(EXAMPLES, TOKENS) < 0.4,
    }
