"""The config of a training run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.rows import RowConfig, Text

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME of a repository


class TrainConfig(RowConfig):
    """Everything that decides a run. Field `max_steps` is flag `--max-steps` and YAML key `max_steps`.

    Paths are relative to the working directory. Unknown fields are errors. In Python:
    `train(TrainConfig(model="M", data=["F.jsonl"], rule="dft", output="RUN"))`.
    """

    rule: Text = Field(description="rule text, the name of a library rule, or a path that ends in .rule")
    set: dict[str, float] = Field(default={}, description="parameter of the rule, NAME=NUMBER; repeatable")
    bind: dict[str, Text] = Field(
        default={}, description="frozen model that the rule reads, NAME=FOLDER; repeatable"
    )
    output: Text = Field(default="priority-run", description="folder of the run: model, log, checkpoints")
    cache: Text | None = Field(
        default=None,
        description="folder of the statistics of frozen models; default: priority_dsl in the user's cache",
    )
    online_reference: bool = Field(
        default=False,
        description="evaluate frozen models at every step, in place of one pass before training",
    )
    strict: bool = Field(default=False, description="warnings about the rule are errors")

    # rows that are read while the model trains on them
    streaming: bool = Field(
        default=False,
        description="read rows as they come, in place of all before the first step; needs --max-steps and a "
        "rule that asks nothing of the whole data set",
    )
    shuffle_buffer: int | None = Field(
        default=None,
        ge=1,
        description="rows of a stream that wait to be drawn from, 1 keeps their order; default: 1000",
    )

    # how a step is computed
    loss: Literal["fused", "dense"] | None = Field(
        default=None,
        description="fused takes the loss from hidden states and output layer and never holds full logits; "
        "dense holds them; same numbers. Default: fused, dense with a note for a model that cannot be taken "
        "apart",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="compute the layers' activations again in the backward pass, to save memory",
    )
    compile: bool = Field(default=False, description="run the model's body through torch.compile")
    compile_backend: Text = Field(
        default="inductor", description="backend of --compile; aot_eager needs no C++ compiler"
    )

    # what is trained: everything, or a low-rank adapter beside frozen weights
    lora: int | None = Field(
        default=None,
        ge=1,
        description="train a LoRA adapter of this rank; `ref` is then the model with it switched off",
    )
    lora_alpha: float | None = Field(
        default=None, gt=0, description="the adapter counts alpha / rank times; default: twice the rank"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout of what the adapter reads")
    lora_targets: tuple[Text, ...] = Field(
        default=(),
        description="linear layers with an adapter, as q_proj,v_proj; repeatable; default: all but the head",
    )

    # how long, in what steps
    max_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps; default: as the epochs give"
    )
    epochs: int | None = Field(
        default=None, ge=1, description="passes over the data (default 1, or as many as --max-steps needs)"
    )
    batch_size: int = Field(default=8, ge=1, description="rows of a micro-batch, in each process")
    accumulation: int = Field(default=1, ge=1, description="micro-batches of an optimizer step")
    packing: bool = Field(
        default=False,
        description="pack several rows into a line, none of which sees another, in place of padding them: "
        "the same rows a step and the same numbers, --batch-size lines a micro-batch, as many micro-batches "
        "as the rows of a step need",
    )
    packing_length: int | None = Field(
        default=None, ge=2, description="tokens of a packed line; default: as the longest row needs"
    )
    pad_to_multiple: int = Field(
        default=1, ge=1, description="pad lines until this divides their length, as 8 or 64 for tensor cores"
    )
    learning_rate: float = Field(default=2e-5, gt=0, description="highest learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = Field(
        default="cosine",
        description="how the learning rate falls after the warm-up; wsd stays and falls at the end",
    )
    warmup: float | None = Field(
        default=None, ge=0, lt=1, description="share of the steps in which the rate rises (default 0.03)"
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="steps in which the rate rises, in place of --warmup"
    )
    decay: float | None = Field(
        default=None, gt=0, le=1, description="share of the steps in which --schedule wsd falls (default 0.2)"
    )
    min_rate: float = Field(
        default=0.0, ge=0, lt=1, description="share of --learning-rate to which a schedule falls"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay, on matrices only")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's decay of the mean squared gradient")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW's term against division by 0")
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of the order of rows, dropout and chance"
    )

    # what is measured and kept
    eval_data: tuple[Text, ...] = Field(
        default=(), description="held-out data, measured at the end; repeatable"
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="also measure --eval-data every so many steps"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop after so many measurements of --eval-steps without a lower held-out nll",
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="how much lower the nll must be, in nats, to count for --patience"
    )
    log_steps: int = Field(default=1, ge=1, description="steps between two lines of the log")
    tracker: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = Field(
        default=(), description="also write the log to this tracker; repeatable"
    )
    project: Text | None = Field(
        default=None, description="project of the run in trackers (default: priority_dsl)"
    )
    run_name: Text | None = Field(
        default=None, description="name of the run in trackers (default: that of the output folder)"
    )
    save_steps: int | None = Field(default=None, ge=1, description="steps between two checkpoints")
    keep_last: int | None = Field(
        default=None, ge=1, description="keep only so many checkpoints, the newest (default: all)"
    )
    keep_best: bool = Field(
        default=False,
        description="also write and keep the checkpoint of the lowest held-out nll; best.json names it",
    )
    max_nll: float | None = Field(
        default=None,
        ge=0,
        description="stop where the plain nll, nats a token, is above this for 10 lines of the log; "
        "0: never; default: 10 above the first line or a uniform guess, the higher of both",
    )
    skip_non_finite: bool = Field(
        default=False,
        description="skip a step whose loss or gradient is not finite, in place of stopping; 10 in a row "
        "stop",
    )
    resume: bool = Field(
        default=False, description="continue from the newest checkpoint in the output folder"
    )
    overwrite: bool = Field(default=False, description="replace the run that the output folder holds")
    quiet: bool = Field(default=False, description="no progress bar and no notes, only errors")
    push_to_hub: Text | None = Field(
        default=None, description="upload the trained model to OWNER/NAME on the hub, with rule, card and log"
    )
    hub_private: bool = Field(default=False, description="make that repository private")
    dry_run: bool = Field(
        default=False,
        description="train nothing and write nothing: show rows with their weights, plan, steps and memory",
    )
    show: int | None = Field(default=None, ge=1, description="rows that --dry-run shows (default 2)")

    @field_validator("tracker", mode="before")
    @classmethod
    def _trackers_parted_at_commas(cls, value: object) -> object:
        """Let one flag name several trackers, each of them once."""
        given = value if isinstance(value, list | tuple) else [value]
        names = [name.strip() for text in given if isinstance(text, str) for name in text.split(",")]
        if not all(isinstance(text, str) for text in given):
            return value
        return tuple(dict.fromkeys(name for name in names if name))

    @model_validator(mode="after")
    def _combinations(self) -> TrainConfig:
        """Refuse flags that would be ignored or contradict each other."""
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues the run in the output folder and --overwrite replaces it: give one"
            )
        if self.packing_length is not None and not self.packing:
            raise ValueError("--packing-length needs --packing, which packs rows into lines of it")
        if self.streaming and (self.max_steps is None or self.epochs is not None):
            raise ValueError("--streaming needs --max-steps and no --epochs: a stream hides how long it is")
        if self.streaming and self.packing:
            raise ValueError("--packing lays lines out for the longest row, which --streaming hides")
        if self.shuffle_buffer is not None and not self.streaming:
            raise ValueError("--shuffle-buffer needs --streaming; all rows in memory are shuffled whole")
        if self.eval_steps is not None and not self.eval_data:
            raise ValueError("--eval-steps needs --eval-data, the rows to measure")
        if self.hub_private and self.push_to_hub is None:
            raise ValueError("--hub-private needs --push-to-hub, the repository")
        if self.push_to_hub is not None and not HUB_NAME.fullmatch(self.push_to_hub):
            raise ValueError(f"--push-to-hub {self.push_to_hub}: must be OWNER/NAME")
        if self.keep_last is not None and self.save_steps is None:
            raise ValueError("--keep-last needs --save-steps, the checkpoints to keep")
        if self.keep_best and (self.eval_steps is None or not self.eval_data):
            raise ValueError("--keep-best needs --eval-steps and --eval-data: the best of those measurements")
        if self.patience is not None and self.eval_steps is None:
            raise ValueError("--patience needs --eval-steps: it counts those measurements")
        if self.min_delta and self.patience is None:
            raise ValueError("--min-delta needs --patience")
        if self.warmup is not None and self.warmup_steps is not None:
            raise ValueError("--warmup is a share of the steps and --warmup-steps their number: give one")
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"--decay is for --schedule wsd, not {self.schedule}")
        if self.min_rate and self.schedule == "constant":
            raise ValueError("--min-rate has no meaning with --schedule constant, which does not fall")
        named = [name for name in ("project", "run_name") if getattr(self, name) is not None]
        if named and not self.tracker:
            raise ValueError(f"--{named[0].replace('_', '-')} needs --tracker")
        if self.show is not None and not self.dry_run:
            raise ValueError("--show needs --dry-run")
        adapting = {"lora_alpha", "lora_dropout", "lora_targets", "quantize"} & self.model_fields_set
        if self.lora is None and any(getattr(self, name) for name in adapting):
            name = min(name for name in adapting if getattr(self, name)).replace("_", "-")
            raise ValueError(f"--{name} needs --lora, the rank of the adapter that is trained")
        if self.compile_backend != "inductor" and not self.compile:  # what config.yaml holds is no choice
            raise ValueError("--compile-backend needs --compile")
        return self
