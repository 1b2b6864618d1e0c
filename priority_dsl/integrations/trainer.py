"""`PriorityTrainer`: the Trainer of transformers under a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from priority_dsl.integrations.using import use_rule
from priority_dsl.integrations.versions import require

require("transformers")

from transformers import Trainer  # noqa: E402

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


class PriorityTrainer(Trainer):
    """A Trainer whose loss is a rule's.

    All arguments of `transformers.Trainer`, and those of `use_rule` by name: `rule`, `models`, `rule_seed`,
    `full_logits`. Rows have `input_ids`, `labels` (-100 where nothing is supervised; default: the ids) and
    the columns that the rule reads; without a `data_collator` they are padded on the right.
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
