"""Every library rule once more, by hand in torch, straight from its formula.

Nothing here imports priority_dsl: these functions are what the compiled rules are measured against.
Each takes logits [B, T, V], targets [B, T] (-100 is ignored), the logits of the other models and the columns,
and returns weights [B, T], loss [B, T] (zero where ignored) and the denominator. All is float64. Weights are
detached, so that autograd through the loss is the gradient that the rule must have. A call is a whole
optimizer step and, for rules that read the data set, all of it; `rows` says which data-set rows those of the
batch are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.rules.by_hand import (
    IGNORED,
    Result,
    at_target,
    cross_entropy,
    drawn,
    entropy,
    entropy_of_most_likely,
    finish,
    kl,
    largest,
    largest_examples,
    log_probability,
    mass_with_ties,
    mass_without_ties,
    mean_of,
    means_of_examples,
    nll,
    over_kept,
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


def twin_t3s(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    risen = log_probability(models["early"], targets) > log_probability(models["ref"], targets)
    return weighted_nll((~risen).double(), logits, targets)


def twin_high_pass(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, epsilon: float
) -> Result:
    return weighted_nll((nll(logits, targets).detach() >= epsilon).double(), logits, targets)


# On the step and the data set --------------------------------------------------------------


def talr_of_the_step(read: Tensor, logits: Tensor, targets: Tensor, w_min: float) -> Result:
    """TALR with the temperature of the step, by what one model says."""
    means = means_of_examples(nll(read, targets).detach(), targets)
    tau = max(median(means), 1e-6) if means else 1e-6
    return weighted_nll(talr_weights(read, targets, tau, w_min), logits, targets)


def twin_talr(logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, w_min: float) -> Result:
    return talr_of_the_step(logits, logits, targets, w_min)


def twin_talr_ref(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, w_min: float
) -> Result:
    return talr_of_the_step(models["ref"], logits, targets, w_min)


def share_of_the_step(of: str, sign: int, model: str | None) -> Callable[..., Result]:
    """The twin of a rule that trains on half of the step: `of` p or entropy, highest (1) or lowest (-1)."""

    def twin(
        logits: Tensor,
        targets: Tensor,
        models: Models,
        columns: Columns,
        *,
        share: float,
        rows: Sequence[int],
    ) -> Result:
        read = models[model] if model else logits
        values = probability(read, targets) if of == "p" else entropy(read)
        kept = largest(sign * values, targets, rows, share)
        return weighted_nll(kept.double(), logits, targets)

    return twin


twin_top_p = share_of_the_step("p", 1, None)
twin_bottom_p = share_of_the_step("p", -1, None)
twin_top_entropy = share_of_the_step("entropy", 1, None)
twin_bottom_entropy = share_of_the_step("entropy", -1, None)
twin_top_p_ref = share_of_the_step("p", 1, "ref")
twin_bottom_p_ref = share_of_the_step("p", -1, "ref")
twin_top_entropy_ref = share_of_the_step("entropy", 1, "ref")
twin_bottom_entropy_ref = share_of_the_step("entropy", -1, "ref")


def twin_entropy_scaling(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    uncertainty = entropy(logits)
    return weighted_nll(uncertainty / max(mean_of(uncertainty, targets), 1e-6), logits, targets)


def twin_srft(logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, factor: float) -> Result:
    weight = factor * math.exp(-mean_of(entropy(logits), targets))
    return weighted_nll(torch.tensor(weight, dtype=torch.float64), logits, targets)


def twin_rho1(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    share: float,
    rows: Sequence[int],
) -> Result:
    excess = nll(logits, targets).detach() - nll(models["curated"], targets)
    kept = largest(excess, targets, rows, share)
    return over_kept(weighted_nll(kept.double(), logits, targets))


def gained_most(targets: Tensor, models: Models, rows: Sequence[int], share: float, down: bool) -> Tensor:
    """Which tokens of the data set are in the share on which the warmed-up model has gained most."""
    gain = nll(models["ref"], targets) - nll(models["warm"], targets)
    return largest(gain, targets, rows, share, down)


def twin_token_cleaning(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    share: float,
    rows: Sequence[int],
) -> Result:
    kept = gained_most(targets, models, rows, share, down=True)
    return over_kept(weighted_nll(kept.double(), logits, targets))


def twin_forgetting(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    share: float,
    strength: float,
    rows: Sequence[int],
    progress: float,
) -> Result:
    """Each token is divided by the size of its group, and the whole by nothing more."""
    positive = gained_most(targets, models, rows, share, down=False)
    negative = (targets != IGNORED) & ~positive
    weights = torch.where(positive, 1.0, -strength * progress)
    sizes = torch.where(positive, positive.sum(), negative.sum()).clamp(min=1)
    weights, loss, _ = finish(weights, product(weights, nll(logits, targets)) / sizes, targets)
    return weights, loss, 1.0


def twin_entrodrop(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    share: float,
    rate: float,
    middle: float,
    slope: float,
    rows: Sequence[int],
    progress: float,
    seed: int,
    epoch: int,
) -> Result:
    sure = largest(-entropy(logits), targets, rows, share)
    chance = rate / (1 + math.exp(-slope * (progress - middle)))
    dropped = sure & (drawn(seed, epoch, rows, targets, call=1) < chance)
    return weighted_nll((~dropped).double(), logits, targets)


def twin_entrodrop_table(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    lam: float,
    rows: Sequence[int],
    seed: int,
    epoch: int,
) -> Result:
    chance = 1 - torch.exp(-lam * entropy(logits))
    return weighted_nll((drawn(seed, epoch, rows, targets, call=1) < chance).double(), logits, targets)


# On columns and structure ----------------------------------------------------------------


def twin_pear(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    low: float,
    high: float,
    gamma: float,
) -> Result:
    """From the last token of an example to its first: what follows is added up, discounted once a token."""
    ratios = log_probability(logits, targets) - per_token(columns["behaviour_logp"], targets)
    ratios = ratios.clamp(low, high)
    weights = torch.zeros_like(ratios)
    for b, row in enumerate(targets.tolist()):
        later = 0.0
        for t in reversed([t for t, target in enumerate(row) if target != IGNORED]):
            weights[b, t] = math.exp(min(max(later, -10), 5))
            later += ratios[b, t].item() + math.log(gamma)
    return weighted_nll(weights, logits, targets)


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
    return over_kept(weighted_nll(weights, logits, targets))


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


def twin_sftkey(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, s: float, progress: float
) -> Result:
    answer = per_token(columns['span("<answer>(.*?)</answer>")'], targets)
    return weighted_nll(torch.ones_like(answer) if progress < s else answer, logits, targets)


def twin_sftkey_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(per_token(columns["key_answer"], targets), logits, targets)


def twin_t3s_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(1 - per_token(columns["learned_early"], targets), logits, targets)


def twin_token_cleaning_table(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(1 - per_token(columns["memorised"], targets), logits, targets)


def twin_critical_token_table(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, delta: float
) -> Result:
    return weighted_nll((per_token(columns["impact"], targets) > delta).double(), logits, targets)


def twin_selectit_table(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float
) -> Result:
    return weighted_nll(per_example([score > tau for score in columns["score"]]), logits, targets)


def twin_diq_table(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    difficult: float,
    influential: float,
) -> Result:
    both = zip(columns["difficulty"], columns["influence"], strict=True)
    return weighted_nll(per_example([a > difficult and b > influential for a, b in both]), logits, targets)


def twin_instruction_mining_table(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, tau: float
) -> Result:
    return weighted_nll(per_example([loss < tau for loss in columns["predicted_loss"]]), logits, targets)


# Examples kept before training: which, of a whole data set -----------------------------------


def kept_selectit(columns: Columns, *, share: float) -> list[bool]:
    return largest_examples([float(v) for v in columns["score"]], share, down=True)


def kept_opencoder(columns: Columns, *, tau: float) -> list[bool]:
    return [bool(p) and s > tau for p, s in zip(columns["passes"], columns["score"], strict=True)]


def kept_diq(columns: Columns, *, share: float) -> list[bool]:
    names = ("difficulty", "influence")
    high = [largest_examples([float(v) for v in columns[name]], share) for name in names]
    return [a and b for a, b in zip(*high, strict=True)]


def kept_instruction_mining(columns: Columns, *, share: float) -> list[bool]:
    return largest_examples([-float(v) for v in columns["predicted_loss"]], share)


def kept_robustft(columns: Columns) -> list[bool]:
    pairs = list(zip(map(bool, columns["relabelled"]), map(float, columns["uncertainty"]), strict=True))
    new = [u for relabelled, u in pairs if relabelled]
    return [not relabelled or u < median(new) for relabelled, u in pairs]


twin_selectit = twin_opencoder = twin_diq = twin_instruction_mining = twin_robustft = twin_sft


def twin_prift_ema(logits: Tensor, targets: Tensor, models: Models, columns: Columns) -> Result:
    return weighted_nll(probability(models["slow"], targets), logits, targets)


def best_of_each(values: Tensor, targets: Tensor, share: float) -> Tensor:
    """The largest share of each example's tokens."""
    return torch.cat(
        [largest(v[None], y[None], [0], share) for v, y in zip(values, targets, strict=True)]
    ).double()


def to_unit(values: Tensor, targets: Tensor) -> Tensor:
    """Each example's tokens brought to [0, 1] by their extremes; 0 where those are equal."""
    scaled = torch.zeros_like(values)
    for line, of_row, y in zip(scaled, values, targets, strict=True):
        found = of_row[y != IGNORED]
        if found.numel() and found.max() > found.min():
            line[:] = (of_row - found.min()) / (found.max() - found.min())
    return scaled


def twin_sstoken(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, gamma: float, rho: float
) -> Result:
    gain = to_unit(nll(models["ref"], targets) - nll(logits.detach(), targets), targets)
    score = gamma * gain + (1 - gamma) * per_token(columns["attention"], targets)
    return over_kept(weighted_nll(best_of_each(score, targets, rho), logits, targets))


def twin_sstoken_table(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, rho: float
) -> Result:
    gain = nll(models["ref"], targets) - nll(logits.detach(), targets)
    score = gain + per_token(columns["attention"], targets)
    return weighted_nll(best_of_each(score, targets, rho), logits, targets)


def twin_gem(logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, beta: float) -> Result:
    own = cross_entropy(logits.detach() / beta, logits)
    return finish(torch.ones(()), nll(logits, targets) - own, targets)


def twin_selectkd(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, b: float, k: float
) -> Result:
    teacher = models["teacher"]
    accepted = at_target(rank_of_each(teacher), logits.detach().argmax(-1)) <= k
    weights = b + (1 - b) * accepted.double()
    return finish(weights, product(weights, kl(teacher, logits)), targets)


def twin_ignorance(
    logits: Tensor, targets: Tensor, models: Models, columns: Columns, *, beta: float
) -> Result:
    ref, on = (models[f"reading({name}, perturbed_text)"] for name in ("ref", "on"))
    return finish(torch.ones(()), nll(logits, targets) + beta * kl(ref, on), targets)


def twin_tshirt_table(
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    *,
    tau: float,
    tau_chunk: float,
    k: float,
) -> Result:
    gain = nll(models["unprompted(ref)"], targets) - nll(models["ref"], targets)
    weights = torch.zeros_like(gain)
    for b, row in enumerate(targets):
        places = [t for t, y in enumerate(row.tolist()) if y != IGNORED]
        for start in range(0, len(places), int(k)):
            chunk = gain[b, places[start : start + int(k)]]
            weights[b, places[start : start + int(k)]] = (
                (chunk > tau) & (chunk.sum() / len(chunk) > tau_chunk)
            ).double()
    return weighted_nll(weights, logits, targets)


def s_ifd(pmis: Sequence[Sequence[float]]) -> list[float]:
    """T-SHIRT's score of each example from the PMI of its tokens, of one neighbour of all examples."""
    bound = median([abs(pmi) for example in pmis for pmi in example])
    scores = []
    for example in pmis:
        informative = [pmi for pmi in example if abs(pmi) > bound]
        scores.append(math.exp(sum(informative) / len(informative)) if informative else 1.0)
    return scores


def keeps_of_tshirt(draws: Sequence[Sequence[Sequence[float]]], share: float) -> list[bool]:
    """The examples that T-SHIRT keeps, from the PMI by neighbour, example and token."""
    scores = list(zip(*map(s_ifd, draws), strict=True))
    high = largest_examples([sum(of) / len(of) for of in scores], 2 * share)
    deviations = {
        i: math.sqrt(sum((s - sum(of) / len(of)) ** 2 for s in of) / len(of))
        for i, of in enumerate(scores)
        if high[i]
    }
    order = sorted(deviations, key=lambda i: (deviations[i], i))
    kept = order[: math.ceil(len(order) / 2)]
    return [i in kept for i in range(len(scores))]


twin_tshirt = twin_sft


TWINS: dict[str, Callable[..., Result]] = {
    name.removeprefix("twin_"): twin for name, twin in list(globals().items()) if name.startswith("twin_")
}
KEEPS: dict[str, Callable[..., list[bool]]] = {
    name.removeprefix("kept_"): kept for name, kept in list(globals().items()) if name.startswith("kept_")
}
OVER_DATASET = {"token_cleaning": True, "forgetting": False}  # whether the count is rounded down


def by_twin(
    name: str,
    logits: Tensor,
    targets: Tensor,
    models: Models,
    columns: Columns,
    params: Mapping[str, float],
    moment: Mapping[str, Any],
) -> Result:
    """The twin of a rule; of `moment` (rows, progress, seed, epoch) it gets what it reads."""
    twin = TWINS[name]
    reads = inspect.signature(twin).parameters
    known = {**params, **moment}
    return twin(logits, targets, models, columns, **{key: known[key] for key in reads if key in known})
