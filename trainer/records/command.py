"""The subcommand `push`. Imports stand where used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.faults import ConfigFault


def push_command(words: list[str]) -> int:
    """`priority push`: upload the model of a finished run."""
    from trainer.flags import CommandParser

    parser = CommandParser(
        "priority push",
        "Upload a trained model with its rule, card, config and log to the Hugging Face hub.",
        "priority push RUN owner/name --private",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub; made where there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--list", action="store_true", help="list what would be uploaded, and upload nothing")
    flags = parser.parse_args(words)
    from trainer.config import HUB_NAME
    from trainer.records.hub import push

    if not HUB_NAME.fullmatch(flags.repo):
        raise ConfigFault(f"{flags.repo}: must be OWNER/NAME")
    folder = Path(flags.run)
    if flags.list:
        for line in _listed(folder):
            print(line)
        return 0
    print(push(folder, flags.repo, flags.private))
    return 0


def _listed(folder: Path) -> Iterator[str]:
    if not (folder / "config.yaml").exists():
        raise ConfigFault(f"{folder}: is not the folder of a run (config.yaml is missing)")
    from trainer.records.hub import uploads

    for name, content in uploads(folder).items():
        yield f"{content.stat().st_size if isinstance(content, Path) else len(content):>12,}  {name}"
