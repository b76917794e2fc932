"""What people read of a run: one page, and its charts.

Charts are functions of what a run has written; each gives a `kl.output.report.svg.Chart` (or None where there is
nothing to draw), whose ``svg()`` is the text of an SVG file with colours of its own, for a paper, and
``svg(standalone=False)`` a part of a page.

- ``kl.output.report.charts.report_charts(summary: Summary, tokens: LazyFrame, responses: LazyFrame) -> list[Chart]``:
  all of a run, with one pass over the token table; ``chart.name`` is a file's name without its end.
- ``charts.certainty_chart(summary)``, ``distribution_chart(summary, spread)``, ``position_chart(spread)``,
  ``prompt_chart(summary, responses)``, ``entropy_chart(spread)``: one each; ``spread`` is
  ``kl.output.report.spread.spread_of(tokens)``.
- For others: ``kl.output.report.scales`` (`Linear`, `Log`, `label`), ``axes`` (`bottom_axis`, `left_axis`, `key`) and
  ``svg`` (`text`, `line`, `rect`, `circle`, `polyline`, `polygon`, `Chart`).
"""
