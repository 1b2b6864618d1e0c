"""A small language that says how much each training token counts, compiled to a loss graph."""

from __future__ import annotations

__version__ = "0.1.0"
