"""`PrioritySFTTrainer`: the SFTTrainer of TRL under a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from priority_dsl.integrations.using import use_rule
from priority_dsl.integrations.versions import require

require("transformers")
require("trl")

from trl.trainer.sft_trainer import SFTTrainer  # noqa: E402

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


class PrioritySFTTrainer(SFTTrainer):
    """An SFTTrainer whose loss is a rule's.

    All arguments of `trl.SFTTrainer`, and those of `use_rule` by name: `rule`, `models`, `rule_seed`,
    `full_logits`. TRL prepares rows of text as ever. Columns with a value a token pass through its padding
    and padding-free collators; to pack them, call `with_stored` and `trl.pack_dataset` yourself, since
    `packing=True` drops all columns but the token ids and labels.
    """

    def __init__(
        self,
        *args: Any,
        rule: CompiledRule,
        models: Mapping[str, Any] | None = None,
        rule_seed: int | None = None,
        full_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        use_rule(self, rule, models=models, seed=rule_seed, full_logits=full_logits)
