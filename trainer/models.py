"""The models of a run: the one that is trained, the frozen ones that the rule reads, their tokenizer."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trainer.adapters import base_of, is_adapter, put_on
from trainer.config import HUB_NAME
from trainer.faults import ConfigFault, ModelFault, first_line

if TYPE_CHECKING:
    from trainer.config import RowConfig


def quieten() -> None:
    """Switch off the notes and loading bars of transformers; this program says what matters itself."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # peft asks transformers by a name that is going to change; it is between the two.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Weights of linear layers in few bits, as `4bit` (nf4, its scales in 8 bits) or `8bit`.

    `bf16`: the products of 4-bit weights are made in bfloat16.
    """

    bits: str
    bf16: bool

    @classmethod
    def of(cls, config: RowConfig) -> Quantize | None:
        """What a config asks for; None for weights as they are."""
        return None if config.quantize is None else cls(config.quantize, config.dtype == "bf16")

    def settings(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`; `ConfigFault` where bitsandbytes is not installed."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigFault(f"--quantize {self.bits} needs bitsandbytes: pip install 'priority_dsl[qlora]'")
        if self.bits == "8bit":
            made = BitsAndBytesConfig(load_in_8bit=True)
        else:
            made = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16 if self.bf16 else torch.float32,
            )
        return {"quantization_config": made, "device_map": {"": PartialState().device}}


@contextmanager
def _told(flag: str, source: str, what: str) -> Iterator[None]:
    """Turn what stops the loading of a part of a model into a `ModelFault`."""
    try:
        yield
    except Exception as error:  # every file format raises its own
        reason = f"the {what} does not load: {first_line(error)}"
        if "trust_remote_code" in str(error):
            reason = (
                f"the {what} needs Python code that comes with it, which would run on this machine as you; "
                "read that code, then allow it with --trust-remote-code"
            )
        if "ignore_mismatched_sizes" in str(error):
            reason = "the weights do not fit the config: some have other sizes"
        raise ModelFault(f"{flag} {source}: {reason}") from error


def _refuse_pickles(source: str, flag: str) -> None:
    """Refuse a folder whose only weights are pickled: they are programs, which run when they are read."""
    folder = Path(source)
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if folder.is_dir() and pickled and not any(folder.glob("*.safetensors")):
        raise ModelFault(
            f"{flag} {source}: its weights are pickled ({pickled[0]}) and could run code when they are read, "
            "so they are not loaded; save them as safetensors first: from_pretrained and save_pretrained of "
            "transformers do that"
        )


def load_model(
    source: str, flag: str = "--model", quantize: Quantize | None = None, trust: bool = False
) -> Any:
    """Load a causal language model in float32 from a folder (or owner/name on the hub).

    Of an adapter folder it is the base with the adapter in it. `quantize` holds linear layers in fewer bits.
    `trust` lets the model run Python code of its own. Weights are safetensors, never pickles.
    Raises `ModelFault` for a missing or incomplete folder, weights that are damaged, do not fit the config,
    or lack some tensor: such a tensor would silently be random.
    """
    _check_source(source, flag)
    if is_adapter(source):
        base = load_model(base_of(source, flag), f"{flag} {source}, base model", quantize, trust)
        return put_on(base, source, flag).model
    _refuse_pickles(source, flag)
    settings = {} if quantize is None else quantize.settings()
    with _told(flag, source, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust,
            **settings,
        )
    model, report = loaded
    lacking = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise ModelFault(f"{flag} {source}: the weights do not fit the config, lacking {shown}")
    return model


def shape_of(source: str, flag: str = "--model", trust: bool = False) -> Any:
    """A model without its weights (on the device `meta`): its config, its classes, the sizes of its tensors.

    Raises `ModelFault` for a missing folder and a config that names no model.
    """
    _check_source(source, flag)
    if is_adapter(source):
        return shape_of(base_of(source, flag), f"{flag} {source}, base model", trust)
    with _told(flag, source, "config"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def load_tokenizer(source: str, chat_template: str | None = None, trust: bool = False) -> Any:
    """Load the tokenizer of a model folder, with a chat template from a file where one is given.

    `trust` lets it run Python code of its own; a template runs in a sandbox always.
    """
    _check_source(source, "--model")
    if is_adapter(source) and not _has_tokenizer(Path(source)):
        source = base_of(source, "--model")
    with _told("--model", source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"[\w-][\w.-]*", name):  # it becomes a file when the tokenizer is saved
            raise ModelFault(
                f"--model {source}: a chat template named {name!r}; letters, digits and _ name one"
            )
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigFault(
                f"--chat-template {chat_template}: cannot be read: {first_line(error)}"
            ) from error
    return tokenizer


def checkpoint_activations(model: Any) -> None:
    """Have a model keep only the inputs of its layers, whose activations the backward pass computes again.

    Raises `ModelFault` for a model whose layers cannot.
    """
    try:
        with warnings.catch_warnings():  # its newer name is not in every version of transformers 5
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelFault(f"--checkpoint-activations: {first_line(error)}") from error


def compile_body(model: Any, backend: str, device: torch.device) -> None:
    """Have the body of a model, up to its last hidden states, run through torch.compile with sizes left open.

    `ConfigFault` where the backend is unknown or this machine cannot compile with it, tried on one product.
    """
    try:
        trial = torch.compile(torch.sin, backend=backend, dynamic=True)
        trial(torch.ones(3, device=device))
    except Exception as error:  # a backend, a compiler and a driver each raise their own
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())  # its first line names the backend
        raise ConfigFault(
            f"--compile: the backend {backend} does not run here ({reason[:300]}); leave --compile out, "
            "install a C++ compiler, or take --compile-backend aot_eager"
        ) from error
    model.base_model.compile(backend=backend, dynamic=True)


def context_of(model: Any) -> int | None:
    """The longest row in tokens that the model's positions allow; None where its config names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def vocabulary_of(model: Any) -> int:
    """How many token ids the model can read."""
    return model.get_input_embeddings().weight.shape[0]


def check_bindings(read: Iterable[str], bind: Mapping[str, str]) -> None:
    """Refuse a model that nobody binds, a binding that the rule does not read, and a folder that is none.

    `read` are the names of the rule's frozen models; `ref` alone has a default, the weights at the start.
    """
    read = set(read)
    for name in sorted(read - bind.keys() - {"ref"}):
        raise ConfigFault(f"the rule reads the model `{name}`: bind it with --bind {name}=FOLDER")
    for name in sorted(bind.keys() - read):
        if name == "on":
            raise ConfigFault("--bind on=...: `on` is the model being trained, which --model names")
        known = ", ".join(sorted(read)) or "none"
        raise ConfigFault(
            f"--bind {name}={bind[name]}: the rule does not read a model `{name}` (it reads: {known})"
        )
    for name, source in bind.items():
        _check_source(source, f"--bind {name}=")


def load_frozen(
    read: Iterable[str],
    start: str,
    bind: Mapping[str, str],
    tokenizer: Any,
    quantize: Quantize | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Load the frozen models that a rule reads, in eval mode and without gradients.

    `ref` is the folder that the run starts from unless it is bound, `quantize` says how that one is held,
    `trust` that models may run Python code of their own.
    Every other folder must have the same tokenizer, where it has one.
    """
    models = {}
    for name in sorted(read):
        source = bind.get(name, start)
        flag = f"--bind {name}=" if name in bind else "--model"
        if name in bind:
            _check_source(source, flag)
            _check_tokenizer(source, name, tokenizer, trust)
        held = None if name in bind else quantize
        models[name] = load_model(source, flag, held, trust).eval().requires_grad_(False)
    return models


def _check_source(source: str, flag: str) -> None:
    path = Path(source)
    place = f"{flag} {source}".replace("= ", "=")
    if path.is_dir():
        if not (path / "config.json").exists() and not is_adapter(source):
            found = [*path.glob("step-*"), *path.glob("checkpoints/step-*")]
            steps = sorted(found, key=lambda step: (len(step.name), step.name))
            inside = f"; it holds the checkpoints {', '.join(map(str, steps))}" if steps else ""
            raise ModelFault(f"{place}: the folder has no config.json, so it is not a model folder{inside}")
    elif path.exists():
        raise ModelFault(f"{place}: is a file; a model is a folder with config.json, weights and tokenizer")
    elif not HUB_NAME.fullmatch(source) or path.parent.is_dir():
        raise ModelFault(f"{place}: no such folder")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))


def _check_tokenizer(source: str, name: str, tokenizer: Any, trust: bool) -> None:
    if Path(source).is_dir() and not _has_tokenizer(Path(source)):
        return
    with _told(f"--bind {name}", source, "tokenizer"):
        other = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        differing = len(ours.items() ^ theirs.items())
        raise ModelFault(
            f"--bind {name}={source}: its tokenizer differs from the trained model's in {differing} entries "
            f"({len(theirs)} tokens against {len(ours)}); models of one rule need the same tokenizer"
        )
