"""One process at a time in a folder: a lock that leaves nothing behind, however the process ends."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.faults import ConfigFault


class Lock:
    """A lock on a folder itself, flock(2), which the kernel gives back when its process ends or is killed.

    There is no file to remain. Where it cannot be had (no such system, a network file system that locks no
    folders) it is left out: a safeguard, on which nothing that is written depends. Leaving it as a context
    manager releases it.
    """

    def __init__(self, folder: Path, what: str):
        """`what` a process does that has the folder, for the message: `a run`."""
        self._folder = folder
        self._what = what
        self._descriptor: int | None = None

    def __enter__(self) -> Lock:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> bool:
        """Lock the folder if it is there; whether that is new. `ConfigFault` where another process has it."""
        if self._descriptor is not None and self._is_ours(self._descriptor):
            return False
        self.release()  # that of a folder in whose place there is another now
        try:
            import fcntl

            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        except (ImportError, OSError):
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigFault(
                f"--output {self._folder}: another process is writing {self._what} into it; wait until it "
                "ends, or name another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let the folder go; nothing where it is not held."""
        if self._descriptor is None:
            return
        import fcntl

        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also for processes forked meanwhile, which share it
        os.close(self._descriptor)
        self._descriptor = None

    def _is_ours(self, descriptor: int) -> bool:
        """Whether the folder is still the one that is locked."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._folder))
        except OSError:
            return False
