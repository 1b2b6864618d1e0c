"""What is read of a run's folder without loading anything heavy: its manifest, the rules inside its rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from priority_dsl.library import SUFFIX

MANIFEST = "manifest.json"
RULES = "rules"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run; None where it has none, or a damaged one."""
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def rules_inside(folder: Path) -> dict[str, str]:
    """The texts of the library's rules that the rule of a run reads, by name."""
    paths = sorted((folder / RULES).glob(f"*{SUFFIX}"))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}
