"""Charts as files for a paper: SVG, and PNG where the extra that draws it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backends.errors import ConfigError, MissingDependencyError
from backends.extras import install_extra
from backends.storage import as_location, write_bytes_atomic
from kl.output.report.drawing.svg import Chart

_ZOOM = 4.0  # 1,840 dots across: a column of a paper at 500 dots an inch
_LETTERS = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><text x="2" y="14" font-family="{}" '
    'font-size="12">{}</text></svg>'
)
# One of them is on each system that has fonts; the program that draws knows no "sans-serif" by itself.
_FONTS = ("Helvetica", "Arial", "DejaVu Sans", "Liberation Sans", "Noto Sans", "Roboto", "Open Sans", "Ubuntu")


def write_figures(place: str, charts: Sequence[Chart]) -> list[str]:
    """Write each chart as ``NAME.svg`` and ``NAME.png`` to a folder, local or remote.

    Returns
    -------
    list of str
        The files, and a line on why there is no PNG if there is none.

    Raises
    ------
    ConfigError
        If a file cannot be written.
    """
    folder = as_location(place)
    lines: list[str] = []
    try:
        rastered = _rasteriser()
        missing = []
    except MissingDependencyError as error:
        rastered, missing = None, [f"warning: {error}"]
    for chart in charts:
        svg = chart.svg()
        files = {"svg": svg.encode("utf-8")} | ({} if rastered is None else {"png": rastered(svg)})
        for ending, data in files.items():
            path = folder / f"{chart.name}.{ending}"
            try:
                write_bytes_atomic(path, data)
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
            lines.append(str(path))
    return [*lines, *missing]


def _rasteriser() -> Callable[[str], bytes]:
    """What makes a PNG of an SVG.

    Raises
    ------
    MissingDependencyError
        If it is not installed, or this machine has no font to write with: labels would be left out without a word.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise MissingDependencyError(
            "no PNG was made (a browser can turn an SVG into one, too): they need resvg-py, which is not installed: "
            f"{install_extra('figures')}"
        ) from error

    def has(font: str) -> bool:
        with_letters, without = (svg_to_bytes(svg_string=_LETTERS.format(font, words)) for words in ("KL", ""))
        return with_letters != without

    font = next(filter(has, _FONTS), None)
    if font is None:
        raise MissingDependencyError(
            "no PNG was made: this machine has no font to write their labels with; install one (Debian: "
            "fonts-dejavu-core), or use the SVG."
        )
    return lambda svg: bytes(svg_to_bytes(svg_string=svg, zoom=_ZOOM, sans_serif_family=font))
