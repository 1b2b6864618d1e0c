"""Which versions of other libraries are known to give the right loss; any other is refused at import."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# From the first (included) to the last (excluded): the ranges of pyproject.toml, which a test compares.
SUPPORTED = {"transformers": ("5", "6"), "trl": ("1.16", "1.17"), "peft": ("0.21", "0.22")}


def require(name: str) -> None:
    """`ImportError` where a library is missing or of a version that was not tested with this package."""
    low, high = SUPPORTED[name]
    wanted = f"{name}>={low},<{high}"
    try:
        found = version(name)
    except PackageNotFoundError:
        raise ImportError(f"this needs {name}: pip install '{wanted}'", name=name) from None
    if not _numbers(low) <= _numbers(found) < _numbers(high):
        raise ImportError(
            f"{name} {found} is not supported, its losses were not compared with ours: "
            f"pip install '{wanted}'",
            name=name,
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version: `5.0.0rc1` is (5, 0, 0)."""
    digits = (part for part in text.split("+")[0].split("."))
    found = []
    for part in digits:
        leading = part[: len(part) - len(part.lstrip("0123456789"))]
        if not leading:
            break
        found.append(int(leading))
    return tuple(found)
