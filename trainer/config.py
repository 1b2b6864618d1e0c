"""The config of a training run: one model that YAML files, command-line flags and Python share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]


class TrainConfig(BaseModel):
    """Everything that decides a run. Field `max_steps` is flag `--max-steps` and YAML key `max_steps`.

    Paths are relative to the working directory. Unknown fields are errors. In Python:
    `train(TrainConfig(model="M", data=["F.jsonl"], rule="dft", output="RUN"))`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # what is trained, on what, how much each token counts
    model: Text = Field(description="model folder (or owner/name on the hub) that the run starts from")
    data: tuple[Text, ...] = Field(
        min_length=1,
        description="training data: .jsonl .json .csv .parquet (.gz) or owner/name:config@split; repeatable",
    )
    rule: Text = Field(description="rule text, the name of a library rule, or a path that ends in .rule")
    set: dict[str, float] = Field(default={}, description="parameter of the rule, NAME=NUMBER; repeatable")
    bind: dict[str, Text] = Field(
        default={}, description="frozen model that the rule reads, NAME=FOLDER; repeatable"
    )
    output: Text = Field(default="priority-run", description="folder of the run: model, log, checkpoints")

    # how long, in what steps
    max_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps; default: as the epochs give"
    )
    epochs: int | None = Field(
        default=None, ge=1, description="passes over the data (default 1, or as many as --max-steps needs)"
    )
    batch_size: int = Field(default=8, ge=1, description="rows of a micro-batch, in each process")
    accumulation: int = Field(default=1, ge=1, description="micro-batches of an optimizer step")
    learning_rate: float = Field(default=2e-5, gt=0, description="highest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="share of the steps in which the rate rises from 0"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay, on matrices only")
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 switches clipping off")
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of the order of rows, dropout and chance"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="precision of the forward pass; weights and statistics stay fp32"
    )
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="auto takes an accelerator where there is one"
    )

    # how rows are read
    prompt: Text | None = Field(default=None, description="field that holds the prompt, with --completion")
    completion: Text | None = Field(default=None, description="field that holds the response, with --prompt")
    separator: str | None = Field(
        default=None,
        description="text between prompt and response; default: nothing for the fields prompt and "
        "completion, a newline for all others",
    )
    chat: bool = Field(default=False, description="put prompt and response through the chat template")
    chat_template: Text | None = Field(
        default=None,
        description="file with a chat template that replaces the tokenizer's; saved with the model",
    )
    max_length: int | None = Field(
        default=None, ge=2, description="longest row in tokens; default: the model's context"
    )
    too_long: Literal["truncate", "drop"] = Field(
        default="truncate", description="what happens to longer rows"
    )

    # what is measured and kept
    eval_data: tuple[Text, ...] = Field(
        default=(), description="held-out data, measured at the end; repeatable"
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="also measure --eval-data every so many steps"
    )
    log_steps: int = Field(default=1, ge=1, description="steps between two lines of the log")
    save_steps: int | None = Field(default=None, ge=1, description="steps between two checkpoints")
    resume: bool = Field(
        default=False, description="continue from the newest checkpoint in the output folder"
    )
    overwrite: bool = Field(default=False, description="replace the run that the output folder holds")
    quiet: bool = Field(default=False, description="no progress bar and no notes, only errors")

    @model_validator(mode="after")
    def _combinations(self) -> TrainConfig:
        """Refuse flags that would be ignored or contradict each other."""
        if (self.prompt is None) != (self.completion is None):
            given, missing = ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            raise ValueError(f"--{given} needs --{missing}: together they name the two fields of a row")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues the run in the output folder and --overwrite replaces it: give one"
            )
        if self.eval_steps is not None and not self.eval_data:
            raise ValueError("--eval-steps needs --eval-data, the rows to measure")
        return self
