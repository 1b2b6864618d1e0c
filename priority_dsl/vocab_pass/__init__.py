"""The sweep over the vocabulary: statistics of models without holding their full logits."""

from __future__ import annotations

from priority_dsl.vocab_pass.heads import Head
from priority_dsl.vocab_pass.sweep import sweep

__all__ = ["Head", "sweep"]
