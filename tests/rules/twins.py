"""Every library rule once more, by hand in torch, straight from its formula.

Nothing here imports priority_dsl: these functions are what the compiled rules are measured against.
Each takes logits [B, T, V], targets [B, T] (-100 is ignored), the logits of the other models and the columns,
and returns weights [B, T], loss [B, T] (zero where ignored) and the denominator. All is float64. Weights are
detached, so that autograd through the loss is the gradient that the rule must have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.rules.by_hand import (
    Result,
    at_target,
    cross_entropy,
    entropy,
    entropy_of_most_likely,
    finish,
    kl,
    log_probability,
    mass_with_ties,
    mass_without_ties,
    nll,
    per_example,
    per_token,
    probability,
    product,
    rank_of_each,
    weighted_nll,
)

# On model statistics ---------------------------------------------------------------------

Models = Mapping[str, Tensor]
Columns = Mapping[str, Any]


def twin_sft(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(torch.ones(()), logits, targets)


def twin_dft(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(probability(logits, targets), logits, targets)


def twin_dft_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(1 - probability(logits, targets), logits, targets)


def twin_profit(logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float) -> Result:
    return weighted_nll((probability(logits, targets) >= tau).double(), logits, targets)


def talr_weights(logits: Tensor, targets: Tensor, tau: float, w_min: float) -> Tensor:
    return torch.exp(log_probability(logits, targets) / tau).clamp(min=w_min)


def twin_talr_fixed(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float, w_min: float
) -> Result:
    return weighted_nll(talr_weights(logits, targets, tau, w_min), logits, targets)


def twin_talr_fixed_ref(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float, w_min: float
) -> Result:
    return weighted_nll(talr_weights(models["ref"], targets, tau, w_min), logits, targets)


def twin_eaft(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, k: float, alpha: float
) -> Result:
    share = entropy_of_most_likely(logits, int(k)) / math.log(k)
    return weighted_nll(share**alpha, logits, targets)


def twin_eaft_ref(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, k: float, alpha: float
) -> Result:
    share = entropy_of_most_likely(models["ref"], int(k)) / math.log(k)
    return weighted_nll(share**alpha, logits, targets)


def twin_eaft_llamafactory(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, alpha: float
) -> Result:
    return weighted_nll((entropy_of_most_likely(logits, 20) / 3.0) ** alpha, logits, targets)


def twin_eaft_axolotl(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, alpha: float
) -> Result:
    return weighted_nll(entropy_of_most_likely(logits, 20) ** alpha, logits, targets)


def twin_asft(logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, beta: float) -> Result:
    weights = probability(logits, targets)
    loss = product(weights, nll(logits, targets)) + beta * kl(models["ref"], logits)
    return finish(weights, loss, targets)


def twin_asft_table(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, delta: float
) -> Result:
    near = kl(logits.detach(), models["ref"]) < delta
    return weighted_nll(near.double(), logits, targets)


def idft_weights(logits: Tensor, targets: Tensor) -> Tensor:
    surprise = (log_probability(logits, targets) + entropy(logits)).clamp(-1, 1)
    return probability(logits, targets) ** torch.exp(-surprise)


def twin_idft(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(idft_weights(logits, targets), logits, targets)


def twin_idft_ref(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(idft_weights(models["ref"], targets), logits, targets)


def schedule(progress: float, warm: float, trans: float) -> float:
    """0 for the first `warm` of the run, 1 after `trans` more, linear between; a step where trans is 0."""
    if trans == 0:
        return float(progress >= warm)
    return min(max((progress - warm) / trans, 0.0), 1.0)


def twin_idft_release(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    beta: float,
    warm: float,
    trans: float,
    progress: float,
) -> Result:
    surprise = log_probability(logits, targets) + entropy(logits)
    target_exponent = torch.exp(-surprise / beta).clamp(0.1, 2.0)
    exponent = 1 + schedule(progress, warm, trans) * (target_exponent - 1)
    return weighted_nll(probability(logits, targets) ** exponent, logits, targets)


def twin_prift_prob(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(probability(models["ref"], targets), logits, targets)


def twin_prift_mass(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float
) -> Result:
    return weighted_nll((mass_with_ties(models["ref"], targets) >= tau).double(), logits, targets)


def twin_prift_mass_release(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float
) -> Result:
    return weighted_nll((mass_without_ties(models["ref"], targets) >= tau).double(), logits, targets)


def twin_prift_cross(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(probability(models["other"], targets), logits, targets)


def twin_kd_decomposed(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, beta: float
) -> Result:
    weights = probability(models["teacher"], targets)
    on_target = product(weights, nll(logits, targets))
    loss = on_target + beta * (cross_entropy(models["teacher"], logits) - on_target)
    return finish(weights, loss, targets)


def twin_ranktuner(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    ranks = rank_of_each(logits)
    expected = (torch.softmax(logits.detach().double(), dim=-1) * ranks).sum(-1)
    exponent = 1 / torch.log2(expected + 1) - 1 / torch.log2(at_target(ranks, targets) + 1)
    return weighted_nll(probability(logits, targets) * 2**exponent, logits, targets)


def twin_rho1_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    improved = nll(logits, targets).detach() < nll(models["ref"], targets)
    return weighted_nll(improved.double(), logits, targets)


def twin_swift_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    risen = probability(logits, targets) - probability(models["ref"], targets)
    return weighted_nll(1 / (1 + torch.exp(-risen)), logits, targets)


def twin_selectkd_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(probability(models["teacher"], targets), logits, targets)


def twin_srft_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(torch.exp(-(entropy(logits) - entropy(models["rl"])).abs()), logits, targets)


def twin_entropy_scaling(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(entropy(logits), logits, targets)


def twin_high_pass(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, epsilon: float
) -> Result:
    return weighted_nll((nll(logits, targets).detach() >= epsilon).double(), logits, targets)


# On columns and structure ----------------------------------------------------------------


def twin_wit(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    w_response: float,
    w_prompt: float,
) -> Result:
    """Prompt tokens are targets too; divided by the tokens whose weight is not zero."""
    response = per_token(columns["response"], targets)
    weights = response * w_response + (1 - response) * w_prompt
    weights, loss, _ = weighted_nll(weights, logits, targets)
    return weights, loss, float((weights != 0).sum())


def twin_forgetting_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    signs = per_example([-1 if label == "neg" else 1 for label in columns["label"]])
    return weighted_nll(signs, logits, targets)


def twin_ignorance_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(1 - 2 * per_example(columns["made_up"]), logits, targets)


def twin_faithful_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(per_token(columns["factual"], targets), logits, targets)


def twin_robustft_table(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, gamma: float
) -> Result:
    return weighted_nll(torch.exp(-gamma * per_example(columns["noise"])), logits, targets)


def twin_atdp_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    weights = per_token(columns["utility"], targets) / per_token(columns["budget"], targets)
    return weighted_nll(weights, logits, targets)


def twin_opencoder_table(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float
) -> Result:
    kept = [
        bool(passes) and score > tau
        for passes, score in zip(columns["passes"], columns["score"], strict=True)
    ]
    return weighted_nll(per_example(kept), logits, targets)


def twin_sftkey_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(per_token(columns["key_answer"], targets), logits, targets)


TWINS: dict[str, Callable[..., Result]] = {
    name.removeprefix("twin_"): twin for name, twin in list(globals().items()) if name.startswith("twin_")
}
READS_PROGRESS = frozenset({"idft_release"})
