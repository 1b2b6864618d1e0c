"""The countdown demonstration: what token priority does to a small model, shown in two minutes."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""The base model and its tokenizer, shipped; `trainer.demo.make_base` made them."""
