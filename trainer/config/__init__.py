"""The configs of the commands: models that YAML files, flags and Python share."""

from trainer.config.evaluation import EvalConfig
from trainer.config.rows import RowConfig, Text
from trainer.config.scoring import ScoreConfig
from trainer.config.training import HUB_NAME, TrainConfig

__all__ = ["HUB_NAME", "EvalConfig", "RowConfig", "ScoreConfig", "Text", "TrainConfig"]
