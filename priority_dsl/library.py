"""Where rule texts come from: a library name, a path to a `.rule` file, or the text itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from priority_dsl.diagnostics import PriorityError, Source, did_you_mean, failure, nearest
from priority_dsl.spelling import LONGEST, is_name

PACKAGE = Path(__file__).resolve().parent
SUFFIX = ".rule"
_KEPT: ContextVar[Mapping[str, str]] = ContextVar("kept rule texts")


def _shipped(name: str) -> Path:
    """A folder that a wheel holds inside the package and a checkout beside it."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def rules_folder() -> Path:
    """The folder of the library's `.rule` files."""
    return _shipped("rules")


def grammar_path() -> Path:
    """The file that defines the syntax, `priority.lark`."""
    return _shipped("grammar") / "priority.lark"


def list_rules() -> list[str]:
    """The names of the library's rules, sorted."""
    stems = (path.stem for path in rules_folder().glob(f"*{SUFFIX}"))
    return sorted({*_KEPT.get({}), *(stem for stem in stems if is_name(stem))})


@contextmanager
def kept_texts(texts: Mapping[str, str]) -> Iterator[None]:
    """Inside, the library's rules of these names have these texts, whatever its files say.

    A run that is repeated reads the rules as it read them, also where the library changed since.
    """
    token = _KEPT.set({**_KEPT.get({}), **texts})
    try:
        yield
    finally:
        _KEPT.reset(token)


def resolve(argument: str, words: Iterable[str] = ()) -> Source:
    """The rule text that an argument stands for, and the name that messages call it.

    An argument that ends in `.rule`, on one line, is a path; a single word is a rule of the library;
    anything else is the text itself and never touches the file system.
    `words` are the vocabulary that an unknown name is compared with.
    Raises `PriorityError`: PD201 for an unknown library name, PD202 for a file that cannot be used.
    """
    if "\n" not in argument and argument.endswith(SUFFIX):
        return Source(_read(argument), argument)
    name = argument.strip(" \t")
    if not is_name(name) or name == "inf":
        return Source(argument)
    if name not in list_rules():
        raise _unknown(name, words)
    kept = _KEPT.get({}).get(name)
    text = _read(str(rules_folder() / f"{name}{SUFFIX}")) if kept is None else kept
    return Source(text, f"{name}{SUFFIX}")


def _unknown(name: str, words: Iterable[str]) -> PriorityError:
    known = set(words)
    hints = [did_you_mean(name, list_rules())] if nearest(name, list_rules()) else []
    if name in known:
        hints.append(f"as an expression it is `weight = {name}`")
    elif close := nearest(name, known):
        hints.append("as an expression: " + " or ".join(f"`weight = {word}`" for word in close))
    else:
        hints.append(f"a single word is a library name; as an expression it is `weight = {name}`")
    hints.append("`priority rules` lists the library")
    return failure("PD201", f"the library has no rule `{name}`", "\n".join(hints))


def _read(path: str) -> str:
    """The text of a rule file; never reads more than a rule may have."""
    try:
        file = Path(path)
        if file.is_dir():
            raise failure("PD202", f"{path} is a folder", "name a `.rule` file in it")
        if file.exists() and not file.is_file():
            raise failure("PD202", f"{path} is not a plain file", "name a `.rule` file")
        with file.open("rb") as opened:
            content = opened.read(4 * LONGEST + 4)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise failure("PD202", f"there is no file {path}", _near_files(path)) from None
    except UnicodeDecodeError as error:
        if len(content) > 4 * LONGEST:
            raise _long(path) from None
        message = f"{path} is not UTF-8 text (byte {error.start:,})"
        raise failure("PD202", message, "save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise failure("PD202", f"{path!r} cannot be read: {reason}", "check the path") from None
    if len(text) > LONGEST:
        raise _long(path)
    return text


def _long(path: str) -> PriorityError:
    return failure("PD202", f"{path} is longer than {LONGEST:,} characters, which no rule is", "split it")


def _near_files(path: str) -> str:
    """Files of the same folder, or a library rule, that may be meant."""
    file = Path(path)
    if file.stem in list_rules():
        return f"the library has it under its name alone: `{file.stem}`"
    siblings = [sibling.name for sibling in file.parent.glob(f"*{SUFFIX}")] if file.parent.is_dir() else []
    return did_you_mean(file.name, siblings, "a path is relative to the current folder")
