"""Locations: local paths are paths, addresses in a bucket behave like them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path, PosixPath, WindowsPath

import pytest
from pydantic import BaseModel

from backends.errors import ConfigError
from backends.extras import install_extra
from backends.storage import (
    Location,
    as_location,
    is_remote,
    is_within,
)
from tests import ROOT


class Settings(BaseModel):
    place: Location
    other: Location | None = None


def test_a_local_location_is_a_plain_path(tmp_path: Path) -> None:
    for text in (str(tmp_path), tmp_path, "relative/x", "file:///tmp/x"):
        assert type(as_location(text)) in (PosixPath, WindowsPath)
    assert as_location("file:///tmp/x") == Path("/tmp/x")
    assert not is_remote(tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://", "names no bucket; write it as gs://BUCKET/FOLDER"),
        ("gs:///x", "names no bucket"),
        ("gs://b/../x", "'..' parts mean nothing"),
        ("gs://b//x", "empty"),
        ("gopher://b/x", "no storage is known as gopher://"),
        ("s3://b/x", "needs a package that is not installed: .*s3fs"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_in_a_line(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        as_location(address)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("package", ["gcsfs", "upath"])
def test_without_the_packages_the_extra_is_named(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from backends.storage import as_location; as_location('gs://b/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("backends.errors.MissingDependencyError: ")
    assert last.endswith(f"which is not installed: {install_extra('gcs')}")


def test_a_setting_is_a_string_outside_and_a_location_inside() -> None:
    settings = Settings.model_validate({"place": "gcs://data/x/", "other": "y"})
    assert str(settings.place) == "gs://data/x"
    assert is_remote(settings.place)
    assert settings.model_dump() == {"place": "gs://data/x", "other": "y"}
    assert settings.model_dump_json() == '{"place":"gs://data/x","other":"y"}'
    assert Settings.model_json_schema()["properties"]["place"]["type"] == "string"
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings
    assert again == Settings.model_validate_json(settings.model_dump_json())
    with pytest.raises(ValueError, match="not a valid path"):
        Settings.model_validate({"place": 5})


def test_what_is_within_a_folder(tmp_path: Path) -> None:
    folder = as_location("gs://data/out")
    assert is_within(folder / "x" / "y", folder)
    assert is_within(folder / "x", as_location("gs://data"))
    assert not is_within(as_location("gs://data/out2/x"), folder)
    assert not is_within(tmp_path, folder)
    assert is_within(tmp_path / "a" / ".." / "b", tmp_path)
