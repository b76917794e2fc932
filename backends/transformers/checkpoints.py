"""Names of checkpoints: where they are, and what decides their numbers.

A model is named by a folder, a GGUF file or a hub id. ``@REVISION`` behind a hub id chooses a branch, tag or commit,
and ``+ADAPTER`` behind either a PEFT adapter. Nothing here loads a model, nor the library that would.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from backends.errors import MissingDependencyError, ModelNotUsableError
from backends.extras import install_extra, install_torch
from backends.local.gguf import content_hash
from backends.transformers.options import TransformersOptions

BACKEND = "transformers"
ENGINE = "transformers/1"  # to be raised when the numbers change: it is part of the key of every score
_WHERE = ("device", "device_map", "local")
_PACKAGES = ("torch", "transformers")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_BESIDE = (".json", ".jinja", ".model", ".txt", ".py")


class Place(NamedTuple):
    """A folder, or a hub id with its commit."""

    path: str
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that can be loaded; equal ones are the same model, loaded in the same way.

    ``settings`` is canonical JSON of what of the options reaches the model, ``content`` names its content.
    """

    name: str
    base: Place
    gguf_file: str | None
    adapter: Place | None
    content: str
    settings: str

    @property
    def options(self) -> dict[str, Any]:
        """What was chosen for it, by the names of the options."""
        return json.loads(self.settings)

    @property
    def version(self) -> str:
        """What reports call the model under all its names: file or folder, content and dtype."""
        content = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{8,}", r"\1", self.content)
        return f"{self.gguf_file or Path(self.base.path).name} ({content}, {self.options['dtype']})"

    def identity(self) -> dict[str, Any]:
        """What decides its numbers, as JSON types; where they are computed does not, but for rounding."""
        settings = {name: value for name, value in self.options.items() if name not in _WHERE}
        return {"engine": ENGINE, "packages": installed_versions(), "content": self.content, "settings": settings}


def find_checkpoint(name: str, options: TransformersOptions) -> Checkpoint:
    """The checkpoint behind a model's name.

    Raises
    ------
    MissingDependencyError
        If a package is missing.
    ModelNotUsableError
        If there is no such model, in one line.
    """
    installed_versions()
    chosen = dict(options.of_model(name))
    path, revision, adapter = _split(chosen.pop("path") or name)
    path, gguf_file = _split_gguf(path)
    revision = chosen.pop("revision") or revision
    adapter = chosen.pop("adapter") or adapter
    gguf_file = chosen.pop("gguf_file") or gguf_file
    base = _place(name, path, revision, options.local_files_only)
    over = None if adapter is None else _place(name, *_split(adapter)[:2], options.local_files_only)
    content = _content(name, base, gguf_file)
    if over is not None:
        content += f" + {_content(name, over, None)}"
    chosen |= {"today": None if options.today is None else options.today.isoformat(), "local": options.local_files_only}
    return Checkpoint(name, base, gguf_file, over, content, json.dumps(chosen, sort_keys=True))


def how_to_install() -> str:
    """The commands that install what this backend needs."""
    return " && ".join(filter(None, (install_extra("hf"), install_torch())))


@functools.cache
def installed_versions() -> dict[str, str]:
    """The versions of the packages that compute.

    Raises
    ------
    MissingDependencyError
        If one is not installed.
    """
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError as error:
            raise MissingDependencyError(f"the transformers backend needs {package!r}: {how_to_install()}") from error
    return found


def unusable(name: str, what: str, *, permanent: bool = False) -> ModelNotUsableError:
    """The error for a checkpoint that cannot be used, in one line."""
    line = " ".join(what.split())
    return ModelNotUsableError(f"model {name!r}: {line}", permanent=permanent, backend=BACKEND, model=name)


def _split(path: str) -> tuple[str, str | None, str | None]:
    """Path, revision and adapter; what exists on the disk is a path as it stands."""
    if Path(path).exists():
        return path, None, None
    base, plus, adapter = path.rpartition("+")
    if plus and base and adapter:
        return *_split(base)[:2], adapter
    base, at, revision = path.rpartition("@")
    return (base, revision, None) if at and base and revision else (path, None, None)


def _split_gguf(path: str) -> tuple[str, str | None]:
    """A GGUF file's folder, or its repository (``OWNER/NAME/FILE.gguf``), and the file in it."""
    if not path.endswith(".gguf"):
        return path, None
    parts = path.split("/")
    if not Path(path).exists() and len(parts) > 2 and all(parts):
        return "/".join(parts[:2]), "/".join(parts[2:])
    return str(Path(path).parent), Path(path).name


def _place(name: str, path: str, revision: str | None, local_only: bool) -> Place:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise unusable(name, f"{path} is a folder and has no revision {revision!r}; leave it out.")
        return Place(str(folder.resolve()))
    parts = path.split("/")
    if len(parts) > 2 or "\\" in path or not all(parts) or parts[0] in (".", "..", "~"):
        raise unusable(name, f"there is no folder {path!r} (looked in {Path.cwd()}).", permanent=True)
    return Place(path, _commit(name, path, revision, local_only))


@functools.lru_cache(maxsize=64)
def _commit(name: str, repository: str, revision: str | None, local_only: bool) -> str:
    """The commit that a revision of a repository is now; asked of the hub once a process."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Given no file to fetch, it finds the commit: at the hub, or where that is away in its cache on this machine.
        found = snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=local_only)
    except LocalEntryNotFoundError as error:
        what = (
            f"{repository!r} is neither a folder here nor in the cache of the hub, and the hub was not asked or is away"
        )
        raise unusable(name, f"{what}; check the name, or fetch it with `hf download {repository}`.") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = f"{repository!r} is no folder here, and the hub says: {str(error).splitlines()[0]}"
        raise unusable(name, f"{what} Check name, revision and access (`hf auth login`).") from error
    return Path(found).name


def _content(name: str, place: Place, gguf_file: str | None) -> str:
    if place.commit is not None:
        return f"commit {place.commit}" + (f" {gguf_file}" if gguf_file else "")
    folder = Path(place.path)
    if gguf_file is not None:
        file = folder / gguf_file
        if not file.is_file():
            raise unusable(name, f"{file} does not exist.", permanent=True)
        return f"sha256 {content_hash(file)}"
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (*_WEIGHTS, *_BESIDE) and file.is_file()]
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix not in (".bin", ".gguf")]  # as transformers chooses
    if not any(file.suffix in _WEIGHTS for file in files):
        raise unusable(name, f"{folder} holds no weights (*.safetensors, *.bin).", permanent=True)
    states = [(file, file.stat()) for file in files]
    return f"sha256 {_folder_hash(tuple((str(file), state.st_size, state.st_mtime_ns) for file, state in states))}"


@functools.lru_cache(maxsize=16)
def _folder_hash(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(f"{Path(path).name}\0{content_hash(Path(path))}\n".encode())
    return digest.hexdigest()
