"""What people read of a run: one page, and its charts.

The page is ``kl.output.report.page.write_report``; how it looks and what it does is in ``assets/``.

Charts are functions of what a run has written. Each gives a `kl.output.report.drawing.svg.Chart`, or None where there
is nothing to draw: its ``svg()`` is the text of an SVG file with colours of its own, for a paper, and
``svg(standalone=False)`` a part of a page.

- ``charts.report_charts(summary: Summary, tokens: LazyFrame, responses: LazyFrame) -> list[Chart]``: all of a run, with
  one pass over the token table; ``chart.name`` is a file's name without its end.
- ``charts.certainty_chart(summary)``, ``distribution_chart(summary, spread)``, ``position_chart(spread)``,
  ``prompt_chart(summary, responses)``, ``entropy_chart(spread)``: one each; ``spread`` is ``spread.spread_of(tokens)``.
- For other charts: ``drawing.scales`` (`Linear`, `Log`, `label`), ``drawing.axes`` (`bottom_axis`, `left_axis`, `key`)
  and ``drawing.svg`` (`text`, `line`, `rect`, `circle`, `polyline`, `polygon`, `Chart`).
"""
