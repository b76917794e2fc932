"""A chart as SVG text: for a page, which gives it colours for both themes, or a file of its own for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460  # of a chart, in its own units; its text is 12 of them

# What report.css says with variables, in the colours of the light theme. No var(), which few converters know.
_PAPER_STYLE = """
text{font:12px Helvetica,Arial,"DejaVu Sans",sans-serif;fill:#1d2127}
.muted{fill:#59616b}.strong{font-weight:bold}
.axis{stroke:#59616b;fill:none}.whisker{stroke:#1d2127;fill:none;stroke-width:1.5}.grid{stroke:#dfe3e8;fill:none}
.bar,.dot,.cell{fill:#0072b2}.line{stroke:#0072b2;fill:none;stroke-width:2}.band{fill:#0072b2;fill-opacity:.2}
.lower-line{stroke:#a64700;fill:none;stroke-width:1.6;stroke-dasharray:5 3}.lower{fill:#a64700}
.lower-mark{stroke:#a64700;stroke-width:2.5}
.mark{stroke:#a64700;fill:none;stroke-width:1.2}.dashed{stroke-dasharray:3 3}
.paper{fill:#fff}
"""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with what to call it.

    Attributes
    ----------
    name : str
        Of a file, without its end.
    title, description : str
        In plain text; a screen reader says them in place of the drawing.
    height : int
        In units of which the width has `WIDTH`.
    body : str
        SVG elements; their classes are those of ``report.css``.
    """

    name: str
    title: str
    description: str
    height: int
    body: str

    def svg(self, *, standalone: bool = True) -> str:
        """The drawing as SVG text; ``standalone`` with its own colours, a white ground and its title on top."""
        head = f'<title id="{self.name}-title">{escape(self.title)}</title>'
        head += f'<desc id="{self.name}-desc">{escape(self.description)}</desc>'
        labels = f'role="img" aria-labelledby="{self.name}-title {self.name}-desc"'
        if not standalone:
            box = f'viewBox="0 0 {WIDTH} {self.height}"'
            return f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {box} {labels}>{head}{self.body}</svg>'
        box = f'width="{WIDTH}" height="{self.height + 24}" viewBox="0 -24 {WIDTH} {self.height + 24}"'
        ground = f'<rect class="paper" y="-24" width="{WIDTH}" height="{self.height + 24}"/>'
        named = text(8, -7, self.title, "strong")
        style = f"<style>{_PAPER_STYLE}</style>"
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {box} {labels}>'
        return f"{start}{head}{style}{ground}{named}{self.body}</svg>\n"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text; ``anchor`` is ``start``, ``middle`` or ``end``."""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str, about: str = "") -> str:
    """A rectangle; ``about`` is what a pointer on it shows."""
    shape = f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return _explained(shape, "rect", about)


def circle(x: float, y: float, radius: float, kind: str, about: str = "") -> str:
    """A disc; ``about`` is what a pointer on it shows."""
    return _explained(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"', "circle", about)


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    return f'<polyline class="{kind}" points="{_points(points)}"/>'


def polygon(points: Sequence[tuple[float, float]], kind: str) -> str:
    """An area between points."""
    return f'<polygon class="{kind}" points="{_points(points)}"/>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _explained(shape: str, name: str, about: str) -> str:
    return f"{shape}><title>{escape(about)}</title></{name}>" if about else f"{shape}/>"
