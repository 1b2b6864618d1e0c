"""The part of a config that every command with a model and data has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


def _without_zero_byte(text: str) -> str:
    if "\0" in text:
        raise ValueError("must hold no zero byte")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_zero_byte)]


class RowConfig(BaseModel):
    """What training and evaluation share: a model, data, and how rows are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Text = Field(description="model folder, or owner/name on the hub")
    data: tuple[Text, ...] = Field(
        min_length=1,
        description="data: .jsonl .json .csv .parquet (.gz) or owner/name:config@split; repeatable",
    )
    prompt: Text | None = Field(default=None, description="field that holds the prompt, with --completion")
    completion: Text | None = Field(default=None, description="field that holds the response, with --prompt")
    chosen: Text | None = Field(
        default=None, description="field that holds the preferred response of a pair, with --rejected"
    )
    rejected: Text | None = Field(
        default=None, description="field that holds the other response of a pair, with --chosen"
    )
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
    bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="rows that cannot be used: refuse lists all of them and stops, skip lists them and "
        "leaves them out",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code that a model brings with it, on this machine and as you; without it "
        "only models that transformers has itself",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="precision of the forward pass; weights and statistics stay fp32"
    )
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="auto takes an accelerator where there is one"
    )
    quantize: Literal["4bit", "8bit"] | None = Field(
        default=None, description="hold the base of an adapter in so few bits, through bitsandbytes (QLoRA)"
    )

    @field_validator("data", "eval_data", "k", "stop", "lora_targets", mode="before", check_fields=False)
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        """Let YAML and Python name a single file without a list."""
        return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else value

    @field_validator("lora_targets", mode="after", check_fields=False)
    @classmethod
    def _parted_at_commas(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Let one flag name several layers."""
        return tuple(name.strip() for given in value for name in given.split(",") if name.strip())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, field: ValidationInfo) -> object:
        """Refuse what Python would read as 1 or 0."""
        if isinstance(value, bool) and cls.model_fields[str(field.field_name)].annotation is not bool:
            raise ValueError("input should be neither true nor false")
        return value

    @model_validator(mode="after")
    def _both_fields(self) -> RowConfig:
        if (self.chosen is None) != (self.rejected is None):
            given, missing = ("chosen", "rejected") if self.rejected is None else ("rejected", "chosen")
            raise ValueError(f"--{given} needs --{missing}: together they name the two responses of a pair")
        if (self.prompt is None) != (self.completion is None) and not (self.prompt and self.chosen):
            given, missing = ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            raise ValueError(f"--{given} needs --{missing}: together they name the two fields of a row")
        return self
