"""What a trainer is set to that would silently bypass a rule, or train on something else than it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from priority_dsl.binding import bindings
from priority_dsl.registry import REGISTRY, Statistic
from priority_dsl.values import walk

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule

# What `use_rule` replaces on a trainer. One that overrides them would be bypassed by the rule, or bypass it.
REPLACED = ("compute_loss", "get_batch_samples", "prediction_step", "evaluation_loop", "log")
_THEIR_OWN = ("transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.base_trainer")


class IntegrationError(ValueError):
    """A rule and a trainer that do not go together; the message says why and what to do."""


def refuse_rule(rule: CompiledRule) -> None:
    """`IntegrationError` for a rule that reads what only `priority train` makes."""
    if rule.checked.reads_pairs:
        raise IntegrationError(
            "the rule is about pairs, whose two responses must be in one call; train it with `priority train`"
        )
    bound = bindings(*rule.checked.everything)
    view = next((name for name, value in sorted(bound.items()) if value.word != "model"), None)
    if view is not None:
        raise IntegrationError(
            f"the rule reads the view `{view}`, a forward pass of its own; train it with `priority train`"
        )
    for value in walk(*rule.checked.everything):
        word = REGISTRY.get(value.word)
        if isinstance(word, Statistic) and word.inside:
            raise IntegrationError(
                f"the rule reads `{value.word}` inside a forward pass; train it with `priority train`"
            )
    average = next((name for name, model in rule.models.items() if model.ema is not None), None)
    if average is not None:
        raise IntegrationError(
            f"the rule reads `{average}`, a moving average of the trained model; use `priority train`"
        )


def refuse_trainer(trainer: Any) -> None:
    """`IntegrationError` for a trainer whose own methods or settings would bypass the rule."""
    kind = type(trainer)
    for name in REPLACED:
        home = getattr(kind, name).__module__
        if home not in _THEIR_OWN:
            raise IntegrationError(
                f"{kind.__name__} has a `{name}` of its own (in {home}), which the rule would replace; "
                "use the rule in Trainer, SFTTrainer or a class that leaves it alone"
            )
        if name in vars(trainer):
            raise IntegrationError(f"the trainer has a rule already, or a `{name}` of its own")
    for wrong, message in _settings(trainer):
        if wrong:
            raise IntegrationError(message)


def _settings(trainer: Any) -> list[tuple[bool, str]]:
    """Each setting that does not go with a rule: whether it is on, and what to say."""
    args, model = trainer.args, trainer.model
    instead = "the rule is the loss"
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    return [
        (
            trainer.compute_loss_func is not None,
            f"`compute_loss_func` next to a rule: {instead}; leave it out",
        ),
        (
            args.label_smoothing_factor > 0,
            f"`label_smoothing_factor` next to a rule: {instead}, which smooths no labels; leave it out",
        ),
        (
            args.use_liger_kernel,
            "`use_liger_kernel` replaces the model's forward pass, and the rule with it; leave it out "
            "(the rule's loss is fused by itself)",
        ),
        (args.n_gpu > 1, "nn.DataParallel is not supported: start the script with torchrun, a process a GPU"),
        (
            trainer.compute_metrics is not None,
            "`compute_metrics` needs full logits, which are never held; evaluation logs the plain nll and "
            "the accuracy, leave it out",
        ),
        (
            parallel is not None and (parallel.cp_enabled or parallel.sp_enabled),
            "context and sequence parallelism cut rows into parts, which a rule must see whole",
        ),
        (
            _is_zero_3(args),
            "DeepSpeed ZeRO-3 holds the output layer in parts; use FSDP2, or ZeRO up to stage 2",
        ),
        (
            getattr(model.config.get_text_config(), "output_router_logits", False) is True,
            "`output_router_logits` adds a loss of the model's own that the rule would drop; set it to False "
            "(in TRL: router_aux_loss_coef=0.0)",
        ),
        (
            getattr(args, "loss_type", "nll") != "nll",
            f"loss_type={getattr(args, 'loss_type', None)!r} next to a rule: {instead}; leave it out",
        ),
        (
            getattr(args, "completion_only_loss", None) is False,
            "completion_only_loss=False would make the prompts part of the response that the rule speaks of; "
            "leave it out, and write `over = all` in the rule to train on prompts too",
        ),
        (
            getattr(args, "packing", False) and args.packing_strategy == "wrapped",
            "packing_strategy='wrapped' loses where examples begin; use 'bfd'",
        ),
    ]


def _is_zero_3(args: Any) -> bool:
    plugin = getattr(args, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
