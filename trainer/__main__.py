"""`python -m trainer` is the command `priority`."""

from __future__ import annotations

import sys

from trainer.cli import main

sys.exit(main())
