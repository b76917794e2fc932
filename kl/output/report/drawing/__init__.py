"""The parts of a chart: scales, axes, SVG elements."""
