"""A rule in a trainer that is there already: `use_rule` on a Trainer, an SFTTrainer, or a class of either.

The model's forward pass takes the batch with what the rule reads, so that whatever wraps the model sees all
of the loss. The micro-batches of an optimizer step are seen together before the first of them runs
(`get_batch_samples`), so counts and values of the batch are those of the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from priority_dsl.fused_plan import fused_plan
from priority_dsl.integrations.collate import ALIGNED, Aligned, AlignedCollator, RowCollator
from priority_dsl.integrations.figures import COUNTED, HeldOutFigures, StepFigures
from priority_dsl.integrations.forward import Call, Moment, Speakers, open_forward
from priority_dsl.integrations.heads import HeadedModel, take_apart, why_whole
from priority_dsl.integrations.numbering import columns_of, is_indexed, numbered
from priority_dsl.integrations.reads import Reads
from priority_dsl.integrations.refusals import IntegrationError, refuse_rule, refuse_trainer
from priority_dsl.step import Step

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


def use_rule(
    trainer: Any,
    rule: CompiledRule,
    *,
    models: Mapping[str, Any] | None = None,
    seed: int | None = None,
    full_logits: bool = False,
) -> None:
    """Let a Trainer or SFTTrainer train under a rule; call it once, right after the trainer is made.

    `models` are the frozen causal language models that the rule reads, by name. Under PEFT `ref` is the
    trained model with its adapter switched off unless it is given. Stored columns come with the data sets
    (`with_stored`). `seed` is that of what the rule draws (default: that of the trainer). `full_logits`
    allows the whole logits of a step in memory, where model or rule leave no other way.

    The training log gets `nll` (plain, nats a supervised token), `weight_mean`, `weight_nonzero`,
    `weight_negative` and `supervised_tokens` of the step that is logged. Evaluation logs the plain nll as
    `eval_loss`, the rule's loss of all rows taken as one step as `eval_weighted_loss` (not for values of the
    batch and groups), and `eval_accuracy`.

    Raises `IntegrationError` where rule and trainer do not go together.
    """
    from priority_dsl.integrations.versions import require

    require("transformers")
    refuse_rule(rule)
    refuse_trainer(trainer)
    _RuleInTrainer(trainer, rule, models or {}, trainer.args.seed if seed is None else seed, full_logits)


@dataclass(frozen=True)
class _Window:
    """What is known of an optimizer step when its first micro-batch runs; `step` None: that is all of it."""

    step: Step | None
    moment: Moment
    shown: bool


class _RuleInTrainer:
    """A rule and the trainer that it is put into; the methods below stand in for the trainer's."""

    def __init__(
        self, trainer: Any, rule: CompiledRule, models: Mapping[str, Any], seed: int, full_logits: bool
    ) -> None:
        self.trainer = trainer
        self.rule = rule
        self.seed = seed
        self.reads = Reads.of(rule, seed)
        self.figures = StepFigures()
        self.held_out: HeldOutFigures | None = None
        self._number_rows()
        self.speakers = _speakers(trainer, rule, models, self._live(), full_logits)
        open_forward(_plain_model(trainer.model))
        self._install()

    # Putting it in ------------------------------------------------------------------------------

    def _number_rows(self) -> None:
        trainer = self.trainer
        # What the rule reads is kept where columns that the model does not read are dropped.
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns = sorted({*trainer._signature_columns, *self.reads.names, "seq_lengths"})
        trainer.train_dataset = self._made_ready(trainer.train_dataset, "the training data")
        held_out = trainer.eval_dataset
        if isinstance(held_out, dict):
            ready = {
                name: self._made_ready(data, f"eval_dataset[{name!r}]") for name, data in held_out.items()
            }
        else:
            ready = self._made_ready(held_out, "the evaluation data")
        trainer.eval_dataset = ready

    def _made_ready(self, data: Any, where: str) -> Any:
        if data is None:
            return None
        if not is_indexed(data) and self.trainer.args.accelerator_config.dispatch_batches is not False:
            raise IntegrationError(
                f"{where} is a stream, whose batches accelerate would cut up for other processes; set "
                "accelerator_config={'dispatch_batches': False}"
            )
        names = columns_of(data)
        if names is not None:
            if "input_ids" not in names:
                raise IntegrationError(
                    f"{where} has no `input_ids`; tokenise it first (it has {sorted(names)})"
                )
            self.reads.check(names, where)
        return numbered(data, self.reads, where)

    def _live(self) -> set[str]:
        """The frozen models that training must run: those kept, and those of missing stored columns."""
        plan = self.rule.plan
        live = set(plan.kept)
        held_out = self.trainer.eval_dataset
        sets = [*held_out.values()] if isinstance(held_out, dict) else [held_out]
        for data in (self.trainer.train_dataset, *sets):
            names = None if data is None else columns_of(data)
            missing = [] if names is None else self.reads.missing(names)
            if missing and plan.surveys:
                raise IntegrationError(
                    f"the rule reads `{missing[0]}` over the whole data set; call with_stored on each one"
                )
            if missing:
                live |= {model for of in plan.passes for model in of.models}
        return live

    def _install(self) -> None:
        trainer = self.trainer
        self._samples = trainer.get_batch_samples
        self._evaluation_loop = trainer.evaluation_loop
        self._log = trainer.log
        trainer.data_collator = AlignedCollator(_inner_collator(trainer), self.reads, self.rule.over)
        # The loss is divided by the counts of the whole step already.
        trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga = True
        trainer.get_batch_samples = self.get_batch_samples
        trainer.compute_loss = self.compute_loss
        trainer.prediction_step = self.prediction_step
        trainer.evaluation_loop = self.evaluation_loop
        trainer.log = self.log

    # Training -----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, each with what is known of the whole step; and its tokens."""
        batches, items = self._samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, items
        batches = [{**batch, ALIGNED: batch[ALIGNED].to(device)} for batch in batches]
        moment = self._moment()
        window = _Window(self._observed(batches, moment), moment, self._is_shown())
        self.figures = StepFigures()
        batches = [{**batch, ALIGNED: replace(batch[ALIGNED], window=window)} for batch in batches]
        return batches, torch.ones((), device=device) if items is None else items

    def _observed(self, batches: list[Any], moment: Moment) -> Step | None:
        """The counts of the whole step; None where it is a single micro-batch, which counts itself."""
        if len(batches) == 1 and self.trainer.accelerator.num_processes == 1:
            return None
        seen = None
        with torch.random.fork_rng(), torch.no_grad():  # a second forward pass, with the same dropout
            for batch in batches:
                found = self._counted(batch, moment)
                seen = found if seen is None else seen + found
        assert seen is not None, "a step has at least one micro-batch"
        return seen.all_reduce()

    def _counted(self, batch: Mapping[str, Any], moment: Moment) -> Step:
        aligned = batch[ALIGNED]
        if self.rule.observes_model:
            model = self.trainer.model_wrapped
            model.train()
            call = Call(self.speakers, aligned, self.seed, moment, counting=True)
            with self.trainer.compute_loss_context_manager():
                return self._spoken(model, self.trainer._prepare_inputs(dict(batch)), call)
        return self.rule.observe(
            None, aligned.targets, columns=aligned.columns, examples=aligned.examples, stored=aligned.stored,
            progress=moment.progress, epoch=moment.epoch, seed=self.seed,
        )  # fmt: skip

    def _moment(self) -> Moment:
        state = self.trainer.state
        return Moment(state.global_step / max(state.max_steps, 1), int(state.epoch or 0))

    def _is_shown(self) -> bool:
        """Whether this step may be logged; its plain nll is computed only then."""
        state, args = self.trainer.state, self.trainer.args
        done = state.global_step + 1
        if str(getattr(args.logging_strategy, "value", args.logging_strategy)) != "steps":
            return True
        regular = done % max(int(state.logging_steps or 1), 1) == 0
        return regular or done >= state.max_steps or (done == 1 and args.logging_first_step)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch: its share of that of the step, divided by nothing any more."""
        aligned: Aligned = inputs[ALIGNED]
        processes = self.trainer.accelerator.num_processes
        window = aligned.window
        if window is None:
            if self.trainer.args.gradient_accumulation_steps * processes > 1:
                raise IntegrationError("a micro-batch came without its step; train with trainer.train()")
            window = _Window(None, self._moment(), True)
        call = Call(self.speakers, aligned, self.seed, window.moment, window.step, nll=window.shown)
        found = self._spoken(model, inputs, call)
        if not bool(found["loss"].isfinite()):
            raise IntegrationError(
                f"step {self.trainer.state.global_step + 1}: the loss is {found['loss'].item()} in the rows "
                f"{aligned.examples.unique().tolist()[:8]}; look at them, or lower the learning rate"
            )
        self.figures.add(aligned, found)
        # DDP averages gradients over processes; the step's loss is their sum.
        loss = found["loss"] * processes
        return (loss, {"loss": loss}) if return_outputs else loss

    @staticmethod
    def _spoken(model: Any, inputs: Mapping[str, Any], call: Call) -> Any:
        return model(**{n: v for n, v in inputs.items() if n not in (ALIGNED, "labels")}, priority=call)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's log, with the figures of the step where it is one of training."""
        if "loss" in logs:
            logs.update(self.figures.shown(self.trainer.accelerator))
        self._log(logs, start_time)

    # Evaluation ---------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The trainer's loop, whose metrics are those of all rows, each token counting the same."""
        checked = self.rule.checked
        weighted = checked.normalize in COUNTED and not checked.batches
        self.held_out = HeldOutFigures(checked.normalize if weighted else None)
        output = self._evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        output.metrics.update(self.held_out.shown(metric_key_prefix))
        self.held_out = None
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, None, None]:
        """The plain nll of a batch; full logits are never made, so there are no predictions."""
        inputs = self.trainer._prepare_inputs(inputs)
        aligned = inputs[ALIGNED].to(inputs["input_ids"].device)
        weighted = self.held_out is None or self.held_out.normalize is not None
        call = Call(self.speakers, aligned, self.seed, self._moment(), accuracy=True, weighted=weighted)
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            found = self._spoken(model, inputs, call)
        if self.held_out is not None:
            self.held_out.add(aligned, found)
        return (found["nll"] * aligned.response).sum() / aligned.response.sum().clamp(min=1), None, None


def _inner_collator(trainer: Any) -> Any:
    """The trainer's collator; one that pads labels too in place of those that it has by default."""
    from transformers import DataCollatorWithPadding, default_data_collator

    collator = trainer.data_collator
    if collator is default_data_collator or type(collator) is DataCollatorWithPadding:
        return RowCollator()
    return collator


def _plain_model(model: Any) -> Any:
    """The causal language model itself, with PEFT's layers inside it where there are any."""
    from accelerate.utils import is_peft_model

    return model.get_base_model() if is_peft_model(model) else model


def _speakers(
    trainer: Any, rule: CompiledRule, models: Mapping[str, Any], live: set[str], full_logits: bool
) -> Speakers:
    """The trained model taken apart, and the frozen models that training needs; others are not touched."""
    from accelerate.utils import is_peft_model

    switched_off = None
    adapted = is_peft_model(trainer.model)
    if adapted:
        from priority_dsl.integrations.versions import require

        require("peft")
        _refuse_prompts(trainer.model)
    missing = sorted(live - models.keys() - ({"ref"} if adapted else set()))
    if missing:
        raise IntegrationError(
            f'the rule reads the frozen model `{missing[0]}`: pass models={{"{missing[0]}": model}}'
            + ("" if missing[0] in rule.plan.kept else ", or call with_stored on the data sets before")
        )
    if "ref" in live and "ref" not in models:
        switched_off = trainer.model.disable_adapter
    for name, model in models.items():
        if model is trainer.model or model is _plain_model(trainer.model):
            raise IntegrationError(f'models["{name}"] is the model that is trained; pass a copy of it')
    reason = _why_full(trainer, rule)
    if reason is not None and not full_logits:
        raise IntegrationError(f"{reason}, which needs full logits in memory; full_logits=True allows that")
    frozen = {name: _frozen(models[name], trainer.args.device, full_logits) for name in live & models.keys()}
    return Speakers(rule, frozen, switched_off, reason is not None)


def _why_full(trainer: Any, rule: CompiledRule) -> str | None:
    model = _plain_model(trainer.model)
    if (reason := why_whole(model)) is not None:
        return reason
    how = fused_plan(rule.checked)
    return how.why if how.kind == "autograd" else None


def _frozen(model: Any, device: Any, full_logits: bool) -> HeadedModel:
    def refuse(reason: str) -> None:
        if not full_logits:
            raise IntegrationError(
                f"{reason}, which needs full logits in memory; full_logits=True allows that"
            )

    return take_apart(model.to(device).eval().requires_grad_(False), False, refuse)


def _refuse_prompts(model: Any) -> None:
    """Refuse adapters that put tokens of their own before the row."""
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise IntegrationError(
            f"{config.peft_type} puts tokens of its own before each row, which the rule's columns do not have"
        )
