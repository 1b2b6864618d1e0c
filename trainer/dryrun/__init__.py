"""`priority train --dry-run`: everything up to the first step, and what a run would do from there."""

from trainer.dryrun.report import dry_run

__all__ = ["dry_run"]
