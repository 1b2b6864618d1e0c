"""What a run needs before its first step: rule, rows, models, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from priority_dsl.integrations.heads import why_whole
from trainer.adapters import Adapter, Base, add_adapter
from trainer.batches import Spread
from trainer.checkpoints import Lasting, Position, restore, restore_lasting
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.examples import write_summary
from trainer.faults import ConfigFault
from trainer.folder import RunFolder
from trainer.health import Health
from trainer.keeping import HeldOut
from trainer.models import checkpoint_activations, compile_body, vocabulary_of
from trainer.moving import Moving
from trainer.objective import Objective
from trainer.opening import Opened, open_run
from trainer.optimizing import make_optimizer, make_schedule
from trainer.order import Order, Shuffled
from trainer.packing import check_masks
from trainer.reading import Part, Rows, read_rows
from trainer.records.manifest import write_manifest
from trainer.references import kept_names, load_kept
from trainer.runlog import RunLog
from trainer.sharding import refuse_sharded, spread_out
from trainer.stopping import Stopping
from trainer.stream import Stream
from trainer.trained import Trained
from trainer.views import Speaker

if TYPE_CHECKING:
    from priority_dsl.rule import CompiledRule


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is ready to go: everything that its steps use. `start` is where it begins or goes on."""

    config: TrainConfig
    rule: CompiledRule
    folder: RunFolder
    log: RunLog
    accelerator: Accelerator
    tokenizer: Any
    policy: Any
    optimizer: Any
    schedule: Any
    objective: Objective
    spread: Spread
    order: Order
    held_out: list[Example]
    start: Position
    moving: Moving
    measured: HeldOut
    health: Health
    stopping: Stopping
    adapter: Adapter | None = None
    lasting: dict[str, Lasting] = field(default_factory=dict)


def prepare(config: TrainConfig, part: Part | None = None, folder: RunFolder | None = None) -> Run:
    """Make a run ready. The output folder is checked first and written last, when nothing else can fail.

    `part` says which of the rows that were read are prepared (--dry-run); `folder` is the output folder,
    where the caller has it for itself.
    """
    opened = open_run(config, folder or RunFolder(config))
    return make_ready(opened, read_rows(opened, part))


def make_ready(opened: Opened, rows: Rows) -> Run:
    """Put models, optimizer and schedule in place, as the checkpoint left them where there is one."""
    config, rule, policy = opened.config, opened.rule, opened.policy
    accelerator, checkpoint, log = opened.accelerator, opened.checkpoint, opened.log
    adapter = None if config.lora is None else add_adapter(policy, config)
    if checkpoint is not None and adapter is not None:
        adapter.restore(checkpoint)
    policy.train()
    fused = takes_apart(policy, rule, config, log)
    frozen, base = frozen_models(opened, rows, adapter, fused)
    # Here, so that a run draws the same whether or not its statistics were in the cache.
    set_seed(config.seed, device_specific=True)
    if config.checkpoint_activations:
        checkpoint_activations(policy)
    bf16, views = config.dtype == "bf16", rows.precompute.views
    averages = {name: m.ema for name, m in rule.models.items() if m.ema is not None}
    moving = Moving(policy.to(accelerator.device), averages, fused, bf16)
    if config.compile:
        compile_body(policy, config.compile_backend, accelerator.device)
    trained = Trained(policy, rule, fused, bf16, views, base)
    trained, optimizer = spread_out(trained, make_optimizer(policy, config), accelerator)
    schedule = make_schedule(optimizer, config, rows.start.planned)
    measured, health, stopping = HeldOut(), Health(config, vocabulary_of(policy)), Stopping(config)
    # What else a resumed run must know again joins here.
    lasting: dict[str, Lasting] = {"held_out": measured, "health": health, "stopping": stopping}
    order: Order = Shuffled(rows.trained, rows.spread, config.seed)
    if config.streaming:
        order = Stream(rows.reader, config, rule, rows.spread, log.note)
        lasting["stream"] = order
    if checkpoint is not None:
        moving.restore(checkpoint)
        restore(checkpoint, trained, optimizer, schedule, accelerator)
        restore_lasting(checkpoint, lasting)
    write_beginning(opened, rows)
    for name in rule.plan.kept:
        if views.base(name) in moving.models:
            frozen[name] = moving.models[views.base(name)]
    objective = Objective(rule, trained, frozen, views, accelerator, config.seed, config.skip_non_finite)
    return Run(
        config, rule, opened.folder, log, accelerator, opened.tokenizer, policy, optimizer, schedule,
        objective, rows.spread, order, rows.held_out, rows.start, moving, measured, health, stopping,
        adapter, lasting,
    )  # fmt: skip


def frozen_models(
    opened: Opened, rows: Rows, adapter: Adapter | None, fused: bool
) -> tuple[dict[str, Speaker], Base | None]:
    """The frozen models that stay loaded, by bound name, and an adapter's base where it is one of them."""
    config, views, packing = opened.config, rows.precompute.views, rows.spread.packing
    refuse_sharded(opened.rule, config, bool(views.inside), opened.accelerator)
    needed = kept_names(opened.rule, config, views)
    base = None if adapter is None else Base.of(adapter, needed, views, config, fused)
    frozen = load_kept(opened, needed - (base.names if base else set()), views)
    if packing is not None:
        check_masks({name: frozen[name].model for name in frozen if views.plain(name)}, packing.mask)
    return frozen, base


def write_beginning(opened: Opened, rows: Rows) -> None:
    """Write what the output folder has from the start; the others wait for the main process."""
    if opened.accelerator.is_main_process:
        path = opened.folder.path
        opened.folder.open(self_contained(opened.rule, opened.config))
        write_summary(path, data=rows.data.summary(), held_out=rows.held.summary())
        opened.log.cut(rows.start.step)
        write_manifest(
            path, opened.config, opened.rule, opened.accelerator, opened.tokenizer, rows.precompute.computed
        )
    opened.accelerator.wait_for_everyone()


def takes_apart(policy: Any, rule: CompiledRule, config: TrainConfig, log: RunLog) -> bool:
    """Whether the trained model is taken apart into body and head for the fused loss.

    Says so where it cannot be; `ConfigFault` where --loss fused was asked for.
    """
    reason = None if config.loss == "dense" else why_whole(policy)
    if reason is None and rule.trained_views:
        reason = f"the gradient flows through {', '.join(sorted(rule.trained_views))}"
    if reason is not None and config.loss == "fused":
        raise ConfigFault(f"--loss fused: {reason}; without the flag this run trains on full logits")
    if reason is not None:
        log.note(f"{reason}: training holds full logits (--loss dense)")
    return config.loss != "dense" and reason is None


def self_contained(rule: CompiledRule, config: TrainConfig) -> str:
    """The canonical text of the rule, and in a comment the parameter values that the run gave it."""
    given = " ".join(f"--set {name}={value}" for name, value in config.set.items())
    return f"# run with {given}\n{rule.text}" if given else rule.text
