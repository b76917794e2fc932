"""The charts of a run: how far and how sure; over sizes, positions, prompts and entropies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import polars as pl

from kl.output.digits import at_least, at_most, rounded
from kl.output.report.drawing.axes import LEFT, RIGHT, anchor, bottom_axis, key, left_axis, rows_of, spaced
from kl.output.report.drawing.scales import Counting, Linear, Log, label
from kl.output.report.drawing.svg import WIDTH, Chart, circle, line, polygon, polyline, rect, text
from kl.output.report.spread import ENTROPY_STEP, SMALLEST, Spread, edge, spread_of
from kl.statistics.summary import Summary

PROMPTS_SHOWN = 12
_ENTROPY_COLUMNS = 34
_UNMARKED = "0.1% KLD"
_SHORT = {"Maximum KLD": "max", "Minimum KLD": "min", "Median KLD": "median"}


def report_charts(summary: Summary, tokens: pl.LazyFrame, responses: pl.LazyFrame) -> list[Chart]:
    """All charts of a run, in the order of the report; one for which there is nothing to draw is left out.

    Reads the token table once, in batches.

    Parameters
    ----------
    summary : Summary
    tokens, responses : pl.LazyFrame
        `kl.tables.schemas.TOKENS` and `kl.tables.responses.RESPONSES`.

    Raises
    ------
    TokenTableError
        If the token table contradicts itself.
    """
    spread = spread_of(tokens)
    drawn = (
        certainty_chart(summary),
        distribution_chart(summary, spread),
        position_chart(spread),
        prompt_chart(summary, responses),
        entropy_chart(spread),
    )
    return [chart for chart in drawn if chart is not None]


def certainty_chart(summary: Summary) -> Chart | None:
    """The KL per token on one line: its interval, its certified and its plausible limit, exact KL and noise floor."""
    found = summary.kl_per_token
    value, lower, upper, exact = (
        part.value for part in (found.estimate, found.lower, found.plausible_upper, found.exact)
    )
    if value is None and lower is None:
        return None
    exact = None if found.exact.n_unknown else exact  # of some positions it is another mean
    ends = found.estimate.ci_low, found.estimate.ci_high
    noise = None if summary.noise_floor is None else summary.noise_floor.kl_per_token.value
    given = [number for number in (value, lower, upper, exact, noise, *ends) if number is not None]
    axis = Linear(min(0.0, *given), max(*given, SMALLEST) * 1.08, 16, WIDTH - 16)
    y, body = 44, ""
    if lower is not None:
        stop = axis.stop if upper is None else axis(upper)
        body += rect(axis(lower), y - 9, stop - axis(lower), 18, "band")
        body += line(axis(lower), y - 16, axis(lower), y + 12, "mark")
    if ends[0] is not None and ends[1] is not None:
        low, high = axis(ends[0]), axis(ends[1])
        body += line(low, y, high, y, "whisker")
        body += line(low, y - 6, low, y + 6, "whisker") + line(high, y - 6, high, y + 6, "whisker")
    if value is not None:
        body += circle(axis(value), y, 6, "dot")
    is_sample = summary.counts.selected < summary.counts.positions
    above: list[tuple[float, str]] = []
    if lower is not None:
        above.append((lower, f"{'lower bound' if is_sample else 'certain'} {at_least(lower)}"))
    if value is not None:
        above.append((value, f"estimate {rounded(value, found.estimate.se)}"))  # the digits of the verdict
    if upper is not None:
        above.append((upper, f"plausible limit {at_most(upper)}"))
    below = [
        (number, f"{name} {rounded(number)}")
        for name, number in (("noise", noise), ("exact", exact))
        if number is not None
    ]
    named, named_below = (spaced([(axis(number), words) for number, words in row]) for row in (above, below))
    body += "".join(line(axis(number), y + 11, axis(number), y + 20, "axis") for number, _ in below)
    body += "".join(text(x, 20, words, "", "middle") for x, words in named)
    body += "".join(text(x, y + 32, words, "muted", "middle") for x, words in named_below)
    body += bottom_axis(axis, axis.ticks(6), y + 44, "KL(P‖Q), nats per token")
    body += key([("whisker", "95 % interval over prompts"), ("band", "what the lists leave open")], 60, y + 98)
    told = ", ".join(words for _, words in (*above, *below))
    interval = "" if ends[0] is None or ends[1] is None else f" 95 % interval {rounded(ends[0])} to {rounded(ends[1])}."
    return Chart(
        "certainty", "How far Q is from P, and how sure that is", f"Nats per token: {told}.{interval}", y + 106, body
    )


def distribution_chart(summary: Summary, spread: Spread) -> Chart | None:
    """How many positions have which KL, on a logarithmic axis, with llama.cpp's percentiles marked."""
    sizes, n_infinite = spread.sizes, spread.n_infinite
    if not sizes.height and not n_infinite:
        return None
    bins = cast(list[int], sizes["bin"].to_list()) or [0]
    first, last = min(bins), max(bins) + 1
    axis = Log(edge(min(first, last - 4)), edge(last), LEFT, RIGHT - (34 if n_infinite else 0))
    total = float(sizes["weight"].sum()) + spread.infinite_weight
    infinite_share = spread.infinite_weight / total
    shares = [float(weight) / total for weight in sizes["weight"]]
    known = ((name, value) for name, value in summary.token_kl.items() if value is not None and name != _UNMARKED)
    short = {name: _SHORT.get(name, name.removesuffix(" KLD").replace(".0%", "%")) for name in summary.token_kl}
    percentiles = [(short[name], value) for name, value in sorted(known, key=lambda item: item[1])]
    marks = [(axis(max(value, SMALLEST)), name) for name, value in percentiles]
    rows = rows_of(marks)
    top = 32 + 13 * max(rows, default=0)
    bottom = top + 140
    up = Linear(0, max(*shares, infinite_share) * 1.05, bottom, top)
    body = left_axis(up, up.ticks(4), "", lambda value: f"{100 * value:.3g} %")
    for number, n, share in zip(bins, sizes["n"], shares, strict=False):
        low, high = (axis.start, axis(edge(0))) if number < 0 else (axis(edge(number)), axis(edge(number + 1)))
        about = f"below {label(SMALLEST)}" if number < 0 else f"{label(edge(number))} to {label(edge(number + 1))}"
        body += rect(low + 0.5, up(share), max(high - low - 1, 2), bottom - up(share), "bar", f"{about} nats: {n:,}")
    if n_infinite:
        y = up(infinite_share)
        body += rect(RIGHT - 24, y, 20, bottom - y, "lower", f"infinite: {n_infinite:,}")
        body += text(RIGHT - 14, bottom + 16, "∞", "strong", "middle")
    for (x, name), row in zip(marks, rows, strict=True):
        y = top - 14 - 13 * row
        body += line(x, y + 3, x, bottom, "mark") + text(x, y, name, "muted", anchor(x))
    body += bottom_axis(axis, axis.ticks(), bottom, "KL of a position, nats (logarithmic); bars: share of positions")
    told = ", ".join(f"{name} {rounded(value)}" for name, value in percentiles)
    about = f"{int(sizes['n'].sum()):,} positions; percentiles in nats: {told}."
    if n_infinite:
        about += f" At {n_infinite:,} more positions the KL is infinite."
    return Chart("distribution", "How large the KL is, position by position", about, bottom + 42, body)


def position_chart(spread: Spread) -> Chart | None:
    """The mean KL along the response, with its 95 % interval as a band, and the certified lower bound."""
    rows = spread.positions
    if not rows.height:
        return None
    places = [(first + last) / 2 for first, last in rows.select("first", "last").iter_rows()]
    means = cast(list[float], rows["mean"].to_list())
    ends = cast(list[float], rows["ci_high"].drop_nulls().to_list())
    # The band of a few prompts may be many times as high as all else.
    top = max(min(max([*means, *ends]), 2 * max(means)), SMALLEST) * 1.05
    axis, up = Counting(max(places), LEFT, RIGHT), Linear(min(0.0, *means), top, 190, 26)
    body = left_axis(up, up.ticks(4), "KL, nats")
    intervals = zip(places, rows["ci_low"], rows["ci_high"], strict=True)
    banded = [(axis(x), up(low), up(high)) for x, low, high in intervals if low is not None and high is not None]
    if len(banded) > 1:
        body += polygon([(x, high) for x, _, high in banded] + [(x, low) for x, low, _ in reversed(banded)], "band")
    lowers = [(axis(x), up(lower)) for x, lower in zip(places, rows["lower"], strict=True) if lower is not None]
    body += polyline(lowers, "lower-line")
    body += polyline([(axis(x), up(mean)) for x, mean in zip(places, means, strict=True)], "line")
    for x, (first, last, n, mean) in zip(places, rows.select("first", "last", "n", "mean").iter_rows(), strict=True):
        place = f"position {first}" if first == last else f"positions {first} to {last}"
        body += circle(axis(x), up(mean), 2.5, "dot", f"{place}: {rounded(mean)} nats, {n:,} measured")
    body += bottom_axis(axis, axis.ticks(), 190, "position in the response (each doubling as wide)")
    kinds = [("line", "mean"), ("lower-line", "certified lower bound")]
    body += key([*kinds, ("band", "95 % interval")] if len(banded) > 1 else kinds, LEFT, 244)
    most = max(range(len(means)), key=means.__getitem__)
    about = (
        f"Mean KL {rounded(means[0])} nats at the first position, {rounded(means[-1])} at the last; the largest mean, "
        f"{rounded(means[most])}, is at position {rows['first'][most]}."
    )
    return Chart("by-position", "Where in the response", about, 252, body)


def prompt_chart(summary: Summary, responses: pl.LazyFrame) -> Chart | None:
    """The prompts with the largest KL per token, each with its certified lower bound, and the mean of all."""
    ranked = summary.by_prompt[:PROMPTS_SHOWN]
    if not ranked:
        return None
    bounds = _lower_by_prompt(responses, [row["prompt_id"] for row in ranked])
    mean = summary.kl_per_token.estimate.value
    known = [row["kl_per_token"] for row in ranked if row["kl_per_token"] is not None]
    axis = Linear(0, max([*known, mean or 0.0, SMALLEST]) * 1.02, 196, RIGHT - 42)
    bottom = 10 + 20 * len(ranked)
    body = "".join(_prompt_row(row, bounds[row["prompt_id"]], axis, 10 + 20 * n) for n, row in enumerate(ranked))
    if mean is not None:
        body += line(axis(mean), 4, axis(mean), bottom, "whisker dashed")
    body += bottom_axis(axis, axis.ticks(4), bottom, "")
    kinds = [("bar", "KL, nats a token"), ("lower-mark", "certified lower bound")]
    body += key(kinds, 8, bottom + 36)
    if mean is not None:
        body += key([("whisker dashed", f"all prompts {rounded(mean)}")], 316, bottom + 36)
    told = (f"{row['source_file']} {_known(row['kl_per_token'])}" for row in ranked)
    about = f"{len(ranked)} of {summary.counts.prompts:,} prompts, nats a token: {', '.join(told)}."
    return Chart("by-prompt", "Prompts with the largest KL", about, bottom + 44, body)


def _prompt_row(row: dict[str, Any], bound: float | None, axis: Linear, y: float) -> str:
    name, value = cast(str, row["source_file"]), cast(float | None, row["kl_per_token"])
    short = name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}"
    drawn = text(axis.start - 6, y + 11, short, "", "end")
    if value is None:
        return drawn + rect(axis.start, y, axis.stop - axis.start, 14, "lower") + text(RIGHT, y + 11, "∞", "", "end")
    about = f"{name}: {rounded(value)} nats a token, {row['n_measured']:,} positions"
    drawn += rect(axis.start, y, axis(value) - axis.start, 14, "bar", about)
    if bound is not None:
        drawn += line(axis(bound), y - 2, axis(bound), y + 16, "lower-mark")
    return drawn + text(RIGHT, y + 11, f"{value:.3g}", "muted", "end")


def _known(value: float | None) -> str:
    return "infinite" if value is None else rounded(value)


def _lower_by_prompt(responses: pl.LazyFrame, prompts: Sequence[str]) -> dict[str, float | None]:
    whole = (pl.col("n_measured") == pl.col("n_selected")) & pl.col("kl_lower_sum").is_not_null()
    lower = pl.when(whole.all()).then(pl.col("kl_lower_sum").sum() / pl.col("n_positions").sum())
    rows = responses.filter(pl.col("prompt_id").is_in(prompts) & (pl.col("n_measured") > 0))
    found = rows.group_by("prompt_id").agg(lower=lower).collect()
    return dict.fromkeys(prompts) | dict(found.iter_rows())


def entropy_chart(spread: Spread) -> Chart | None:
    """How certain P was, against how far Q is from it: a density of bounded size."""
    if not spread.entropies.height:
        return None
    width = -(-(cast(int, spread.entropies["column"].max()) + 1) // _ENTROPY_COLUMNS)
    by = (pl.col("column") // width, pl.col("bin") // 2)
    cells = spread.entropies.group_by(by, maintain_order=True).agg(pl.col("n", "weight").sum())
    columns, bins = (cast(list[int], cells[name].to_list()) for name in ("column", "bin"))
    first, last = min(*bins, max(bins) - 1), max(bins) + 1
    across = Linear(0, (max(columns) + 1) * width * ENTROPY_STEP, LEFT, RIGHT)
    up = Log(edge(2 * first), edge(2 * last), 190, 26)
    weights = cast(list[float], cells["weight"].to_list())
    room = min((RIGHT - LEFT) / (max(columns) + 1), 164 / (last - first), 22) / 2
    body = left_axis(up, up.ticks(), "KL, nats (logarithmic)")
    for column, number, n, weight in zip(columns, bins, cells["n"], weights, strict=True):
        x = across((column + 0.5) * width * ENTROPY_STEP)
        y = (up(edge(2 * number)) + up(edge(2 * number + 2))) / 2
        body += circle(x, y, max(room * (weight / max(weights)) ** 0.5, 1.2), "dot", f"{n:,} positions")
    body += bottom_axis(across, across.ticks(6), 190, "entropy of P, nats (0: P is certain of its token)")
    about = "Each disc: positions with that entropy of P and that KL; its area grows with their number."
    return Chart("entropy", "Do they part where P was unsure?", about, 232, body)
