"""The same rule inside other trainers: Hugging Face Trainer, TRL's SFTTrainer, and what a loop needs.

Importing this loads none of them; each name below loads its library when it is asked for.

    PriorityTrainer      transformers.Trainer that trains under a rule
    PrioritySFTTrainer   trl.SFTTrainer that trains under a rule
    use_rule             puts a rule into a trainer that is there already
    with_stored          computes what frozen models say of a data set, once before training
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from priority_dsl.integrations.refusals import IntegrationError

if TYPE_CHECKING:
    from priority_dsl.integrations.dataset import with_stored
    from priority_dsl.integrations.sft import PrioritySFTTrainer
    from priority_dsl.integrations.trainer import PriorityTrainer
    from priority_dsl.integrations.using import use_rule

__all__ = ["IntegrationError", "PrioritySFTTrainer", "PriorityTrainer", "use_rule", "with_stored"]

_PLACES = {
    "PrioritySFTTrainer": "sft",
    "PriorityTrainer": "trainer",
    "use_rule": "using",
    "with_stored": "dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
