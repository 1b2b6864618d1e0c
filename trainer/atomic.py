"""Files and folders that are there whole or not at all, whenever the process dies or the power goes.

What is being written has a name that begins with PARTIAL. It is forced to disk, then renamed. What a killed
run left unfinished is found by its name and removed at the next start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"
HEADINGS = ("adapter_config.json", "config.json")  # without them a folder is no model, no adapter


def partial_of(final: Path) -> Path:
    """The name under which something is written, beside the place that it gets in the end."""
    return final.with_name(PARTIAL + final.name)


def write_file(path: Path, text: str) -> None:
    """Write a text file in UTF-8, in place of an old one, which stays as it is until then."""
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def start_folder(final: Path) -> Path:
    """An empty folder to write into, whose name says that it is unfinished; its parent must be there."""
    partial = partial_of(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def publish_folder(final: Path) -> None:
    """Force the folder that `start_folder` gave, and all in it, to disk, and give it its name.

    A folder that has the name already is set aside first.
    """
    partial = partial_of(final)
    sync_tree(partial)
    if final.exists():
        discard(final)
    partial.rename(final)
    sync(final.parent)


def publish_files(final: Path) -> list[str]:
    """Move the files of the folder that `start_folder` gave to the folder around it; returns their names.

    Names that say what a folder holds are taken away first and come last: until then it is no model.
    """
    partial, around = partial_of(final), final.parent
    sync_tree(partial)
    names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name in HEADINGS, name))
    for name in HEADINGS:
        (around / name).unlink(missing_ok=True)
    for name in names:
        (partial / name).replace(around / name)
    sync(around)
    partial.rmdir()
    return names


def discard(folder: Path) -> None:
    """Remove a folder so that it never stands there half removed under its name."""
    old = folder.with_name(f"{PARTIAL}old-{folder.name}")
    if old.exists():
        shutil.rmtree(old)
    folder.rename(old)
    sync(folder.parent)
    shutil.rmtree(old)


def leftovers(folder: Path) -> Iterator[Path]:
    """What killed runs left unfinished in a folder."""
    return folder.glob(PARTIAL + "*")


def remove(path: Path) -> None:
    """Remove a file or a folder, whichever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder and all that it holds to disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
