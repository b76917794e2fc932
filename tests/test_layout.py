"""The rooms: imports run flows → backends → kl, and light things stay light."""

import subprocess
import sys

import pytest

from tests import ROOT


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a statement loads in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def modules_of(room: str) -> list[str]:
    return [f"{room}.{path.stem}" for path in sorted((ROOT / room).glob("*.py")) if path.stem != "__init__"]


def test_kl_loads_nothing_but_numbers() -> None:
    loaded = loaded_by("import " + ", ".join(modules_of("kl")))
    assert not loaded & {"flows", "backends", "prefect", "pluggy", "pydantic", "httpx", "httpx2", "requests", "google"}


def test_backends_load_no_flow() -> None:
    loaded = loaded_by("import " + ", ".join(modules_of("backends")))
    assert not loaded & {"flows", "prefect"}


@pytest.mark.parametrize("heavy", ["gguf", "tokenizers", "jinja2"])
def test_backends_load_the_model_libraries_only_with_a_model(heavy: str) -> None:
    assert heavy not in loaded_by("import backends.local.backend")


def test_the_registry_loads_no_sdk() -> None:
    loaded = loaded_by("from backends.registry import build_targets; build_targets()")
    assert not loaded & {"google", "gguf", "prefect"}
