"""Writing the trained model, whole however it is held: a model folder, or an adapter folder for its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.sharding import is_sharded

if TYPE_CHECKING:
    from trainer.prepare import Run

INSIDE = "model."  # the model in `Trained`


def write_model(run: Run, folder: Path) -> None:
    """Write the trained model, or its adapter, and the tokenizer into a folder that is there.

    Every process calls this, since shards are gathered from all of them; the main one writes.
    """
    weights = _gathered(run)
    if not run.accelerator.is_main_process:
        return
    if run.adapter is not None:
        run.adapter.save(folder, weights)
    else:
        run.policy.save_pretrained(folder, state_dict=weights)
    run.tokenizer.save_pretrained(folder)


def _gathered(run: Run) -> dict[str, Tensor] | None:
    """The weights of a sharded model, whole in the main process; None where each process holds them all.

    Of tied weights only those that the others follow: gathered, they are apart, and would be written twice.
    """
    if not is_sharded(run.accelerator):
        return None
    found: Any = run.accelerator.get_state_dict(run.objective.trained)
    named = {name.removeprefix(INSIDE): value for name, value in (found or {}).items()}
    return {name: value for name, value in named.items() if name not in run.policy.all_tied_weights_keys}
