"""The config of `priority score`."""

from __future__ import annotations

from pydantic import Field

from trainer.config.rows import RowConfig, Text


class ScoreConfig(RowConfig):
    """Everything that decides which weights a data set gets; as for training, fields are flags."""

    rule: Text = Field(description="rule text, the name of a library rule, or a path that ends in .rule")
    set: dict[str, float] = Field(default={}, description="parameter of the rule, NAME=NUMBER; repeatable")
    bind: dict[str, Text] = Field(
        default={}, description="frozen model that the rule reads, NAME=FOLDER; repeatable"
    )
    out: Text = Field(description="Parquet file for tokens, statistics and weights, a row of data each")
    batch_size: int = Field(default=8, ge=1, description="rows that go through a model together, at least")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of the chance of the rule")
    cache: Text | None = Field(
        default=None,
        description="folder of the statistics of frozen models; default: priority_dsl in the user's cache",
    )
    strict: bool = Field(default=False, description="warnings about the rule are errors")
    quiet: bool = Field(default=False, description="no progress bar and no notes, only errors")
