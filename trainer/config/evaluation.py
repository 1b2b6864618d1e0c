"""The config of an evaluation."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.checkers.table import CHECKERS
from trainer.checkers.tasks import ALIASES, TASKS
from trainer.config.rows import RowConfig, Text


class EvalConfig(RowConfig):
    """Everything that decides an evaluation; as for training, fields are flags and YAML keys."""

    batch_size: int = Field(default=32, ge=1, description="rows that go through the model together")
    limit: int | None = Field(default=None, ge=1, description="measure only the first so many rows")
    samples: int = Field(default=0, ge=0, description="responses drawn for each prompt; 0 draws none")
    task: Text | None = Field(
        default=None,
        description="rows of a known evaluation, which sets fields, prompt, checker and --stop: "
        + "; ".join(f"{name} ({task.summary})" for name, task in TASKS.items() if name not in ALIASES)
        + f"; {', '.join(ALIASES)} are math",
    )
    checker: Text | None = Field(
        default=None,
        description="what makes a response right: "
        + "; ".join(f"{name} ({check.summary})" for name, check in CHECKERS.items())
        + "; or module:function of (response, reference, row)",
    )
    check_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="longest check of one response (checkers python and boxed)"
    )
    check_memory: int = Field(
        default=1024, ge=64, description="MiB that the check of one response may use (python and boxed)"
    )
    workers: int | None = Field(
        default=None, ge=1, description="checks at the same time (python and boxed; default: one a core)"
    )
    unsafe_checker: bool = Field(
        default=False,
        description="let the checker python run code that a model wrote where this machine cannot keep it "
        "from files, network and other processes",
    )
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="report Pass@K; repeatable, at most --samples (default: 1 and --samples)"
    )
    temperature: float = Field(default=1.0, ge=0, description="of the sampling; 0 takes the likeliest token")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens of this share"
    )
    max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="longest response in tokens; --task sets its own where this is not given",
    )
    stop: tuple[Text, ...] = Field(
        default=(), description="text that ends a response and is no part of it; repeatable"
    )
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="what draws the responses; vllm has to be installed"
    )
    entropy: bool = Field(default=False, description="report the entropy of the model, nats a token")
    base: Text | None = Field(default=None, description="folder of a base model: report KL(model || base)")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of the sampling")
    output: Text | None = Field(default=None, description="file for the figures, as JSON")
    responses: Text | None = Field(
        default=None, description="file for prompts and responses, right or wrong and why, as JSON lines"
    )
    quiet: bool = Field(default=False, description="no progress bar")

    @model_validator(mode="after")
    def _combinations(self) -> EvalConfig:
        """Refuse flags that would be ignored or contradict each other."""
        drawing = {"temperature", "top_p", "max_new_tokens", "stop", "responses"} & self.model_fields_set
        drawing |= {"engine"} if self.engine == "vllm" else set()
        if drawing and not self.samples:
            raise ValueError(f"--{min(drawing).replace('_', '-')} needs --samples, the responses to draw")
        if self.checker is not None and not self.samples:
            raise ValueError("--checker needs --samples, the responses to check")
        if self.task is not None and self.task not in TASKS:
            close = get_close_matches(self.task, TASKS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"--task {self.task}: unknown; {hint}known are {', '.join(TASKS)}")
        fields = {"prompt", "completion", "separator", "chosen"} & self.model_fields_set
        if self.task is not None and fields:
            raise ValueError(f"--{min(fields)}: --task says what of a row is prompt and response: give one")
        if self.k and self.check_name is None:
            raise ValueError("--k needs --checker, which says what is right")
        if self.k and max(self.k) > self.samples:
            raise ValueError(f"--k {max(self.k)} needs at least as many --samples, not {self.samples}")
        uses = self.check_name or self.entropy or self.base or self.responses
        if self.samples and not uses:
            raise ValueError(
                "--samples needs --checker, --entropy or --base (or --task, --responses): what they are for"
            )
        bounds = {"check_seconds", "check_memory", "workers"} & self.model_fields_set
        if bounds and self.check_name not in ("python", "boxed"):
            raise ValueError(f"--{min(bounds).replace('_', '-')} is for the checkers python and boxed")
        if self.unsafe_checker and self.check_name != "python":
            raise ValueError("--unsafe-checker is for the checker python")
        return self

    @property
    def check_name(self) -> str | None:
        """The checker that is asked for, or that of the task."""
        return self.checker or (TASKS[self.task].checker if self.task is not None else None)
