"""Where files are: addresses in a bucket beside local paths, behind one `Path`.

A location is a `pathlib.Path` where it is local, and behaves as such in every respect. ``gs://bucket/folder`` (and any
other address that fsspec knows) is a `UPath`. That class has the methods of `Path` but is none; it is passed on as one,
by the one cast in `as_location`, so that what only joins and prints paths need not know the difference. What reads and
writes uses the functions of `backends.storage.files`.

Credentials are found as by Google's own clients: Application Default Credentials, or none where
``STORAGE_EMULATOR_HOST`` names an emulator.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePath
from typing import Annotated, Any, cast

import fsspec
from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from backends.errors import ConfigError, MissingDependencyError
from backends.extras import install_extra

# The class that gcsfs registers by default asks each bucket for its kind over gRPC, which emulators and many proxies do
# not speak; ordinary and hierarchical buckets need none of it. Registered here so that unpickled paths have it too.
fsspec.register_implementation("gs", "gcsfs.core.GCSFileSystem", clobber=True)
fsspec.register_implementation("gcs", "gcsfs.core.GCSFileSystem", clobber=True)
# What gcsfs logs, with a traceback each time, it also raises; then it is said here, in a line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

_LOCAL_PROTOCOLS = ("file", "local")
_GOOGLE_PROTOCOLS = ("gs", "gcs")


def as_location(text: str | Path) -> Path:
    """A folder or file from its address: ``gs://bucket/folder`` or a local path.

    Raises
    ------
    ConfigError
        If the address cannot be used, or the packages for its storage are not installed (`MissingDependencyError`).
    """
    if isinstance(text, PurePath) or is_remote(text):
        return cast("Path", text)
    if "://" not in text:
        return Path(text)
    protocol, _, rest = text.partition("://")
    if protocol in _LOCAL_PROTOCOLS:
        return Path(rest)
    _check_address(text, protocol, rest)
    scheme = "gs" if protocol in _GOOGLE_PROTOCOLS else protocol  # one name for one place
    return cast("Path", _upath()(f"{scheme}://{rest.rstrip('/')}", **_options(scheme)))


def is_remote(path: object) -> bool:
    """Whether a location is in a bucket and not on a disk of this machine."""
    return not isinstance(path, str | PurePath) and hasattr(path, "storage_options")


def is_google(path: Path) -> bool:
    """Whether a remote location is in Google Cloud Storage."""
    remote: Any = path
    return remote.protocol in _GOOGLE_PROTOCOLS


def resolved(path: Path) -> Path:
    """The path by which two names of one place are equal; one of links in a circle stays as it is."""
    return path if is_remote(path) else Path(os.path.realpath(path))


def is_within(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder or below it."""
    if is_remote(path) != is_remote(folder):
        return False
    if not is_remote(path):
        return resolved(path).is_relative_to(resolved(folder))
    return f"{path}/".startswith(f"{str(folder).rstrip('/')}/")


def _upath() -> Any:
    try:
        from upath import UPath
    except ImportError as error:
        raise _missing("addresses such as gs://bucket/folder", "universal-pathlib") from error
    return UPath


def _check_address(text: str, protocol: str, rest: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(f"{text!r}: no storage is known as {protocol}://; use gs://BUCKET/FOLDER.") from error
    except ImportError as error:
        if protocol in _GOOGLE_PROTOCOLS:
            raise _missing(f"{protocol}:// addresses", "gcsfs") from error
        raise MissingDependencyError(f"{text!r} needs a package that is not installed: {error}.") from error
    parts = rest.rstrip("/").split("/")
    if not parts[0]:
        raise ConfigError(f"{text!r} names no bucket; write it as {protocol}://BUCKET/FOLDER.")
    if {"", ".", ".."} & set(parts):
        raise ConfigError(f"{text!r}: empty, '.' and '..' parts mean nothing in a bucket; write the plain address.")


def _missing(what: str, package: str) -> MissingDependencyError:
    return MissingDependencyError(f"{what} need {package}, which is not installed: {install_extra('gcs')}")


def _options(protocol: str) -> dict[str, Any]:
    """What the file system is told: nothing may be answered from an earlier listing, other processes write too."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in _GOOGLE_PROTOCOLS:
        import aiohttp  # gcsfs has it

        # A transfer may take its time; one that has stopped is seen. The usual limit is five minutes in all.
        options["requests_timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
        # Without this gcsfs goes on as nobody when it finds no credentials, and every call is refused.
        options["token"] = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else "google_default"
    return options


def _validate(value: object) -> Path:
    if not isinstance(value, str | PurePath) and not is_remote(value):
        raise PydanticCustomError("path_type", "Input is not a valid path")
    return as_location(cast("Path | str", value))


# The type of a setting that is a location: from a string, to a string.
Location = Annotated[
    Path,
    PlainValidator(_validate),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "format": "path"}),
]
