"""The page in a real browser: its figures, its hands, what it must not do."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import polars as pl
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from kl.output.headline import headline
from kl.statistics.summary import RunFacts
from kl.tables.responses import ResponseInfo, summarise_responses
from tests.kl.output.report.made import MadeRun, made_run

# .ci/run says which; a developer without one skips these tests.
CHROMIUM = os.environ.get("TOKENKL_CHROMIUM") or shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
HOSTILE = [
    "</script>",
    "<script>hit=1</script>",
    "</style>",
    "<!--",
    "<img src=x onerror=hit=1>",
    "\u202e",
    "&lt;",
    "{{title}}",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page with what it did behind the reader's back."""

    page: Page
    said: list[str]
    requests: list[str]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a file; afterwards nothing may have been said on the console, nor anything been asked for."""
    all_opened: list[Opened] = []

    def open_page(file: Path, place: str = "", **settings: object) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        page = context.new_page()
        page.set_default_timeout(10_000)
        seen = Opened(page, [], [])
        all_opened.append(seen)

        def note(message: ConsoleMessage) -> None:
            seen.said.append(message.text)

        def count(request: Request) -> None:
            seen.requests.append(request.url)

        page.on("console", note)
        page.on("pageerror", lambda error: seen.said.append(str(error)))
        page.on("request", count)
        page.goto(f"file://{quote(str(file))}{place}")
        return page

    yield open_page
    for seen in all_opened:
        assert seen.said == []
        assert [url for url in seen.requests if not url.startswith("file://")] == []
        assert len(seen.requests) == 1
        seen.page.context.close()


@pytest.fixture(scope="module")
def run() -> MadeRun:
    """Thirty responses; at one position nothing was asked, one is missing, one infinite, one has bounds only."""
    made = made_run(30, 20)
    place = pl.col("position")
    odd = {3: ("s", None, None), 5: ("x", "blocked", "service <b>refused</b>"), 7: ("i", "infinite", "Q excludes it"),
           9: ("b", "short", "a short list")}  # fmt: skip
    first = pl.col("source_file") == made.tokens["source_file"][0]
    tokens = made.tokens
    for at, (kind, reason, error) in odd.items():
        here = first & (place == at)
        tokens = tokens.with_columns(
            selected=pl.col("selected") & ~(here & (kind == "s")),
            pi=pl.when(here & (kind == "s")).then(0.5).otherwise("pi"),
            reason=pl.when(here).then(pl.lit(reason, dtype=pl.String)).otherwise("reason"),
            error=pl.when(here).then(pl.lit(error, dtype=pl.String)).otherwise("error"),
            kl_estimate=pl.when(~here).then("kl_estimate"),
            kl_lower=pl.when(~here | (kind in ("i", "b"))).then("kl_lower"),
            kl_exact=pl.lit(None, dtype=pl.Float64),
        )
    return replace(made, tokens=tokens)


@pytest.fixture(scope="module")
def report(run: MadeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.write(tmp_path_factory.mktemp("report") / "report.html", record={"warnings": ["a warning <b>"]})


def text(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text()


def cells(page: Page) -> list[list[str]]:
    return page.locator("#table tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")


def test_figures_are_those_of_the_run(tmp_path: Path, opened: Callable[..., Page]) -> None:
    made = made_run(12, 30)
    page = opened(made.write(tmp_path / "réport #1.html"))
    summary = made.summary
    found = summary.kl_per_token.estimate
    assert text(page, ".verdict").startswith(f"Q differs from P by {found.value:.2f}"[:-1])
    pairs = page.locator("#verdict dl").first.locator("div").evaluate_all(
        "rows => rows.map(r => [r.querySelector('dt').textContent, r.querySelector('dd').textContent])"
    )  # fmt: skip
    assert [tuple(pair) for pair in pairs] == [(label.strip(), words) for label, words in headline(summary)]
    rows = summarise_responses(made.tokens.lazy()).sort("kl_mean_per_token", descending=True)
    assert [(row[0], float(row[1]), float(row[2]), float(row[3]), row[5]) for row in cells(page)] == [
        (f"{row['source_file']}#0", *(pytest.approx(row[name], rel=1e-3) for name in ("kl", "lower", "max_kl")), "30")
        for row in rows.with_columns(kl="kl_mean_per_token", lower=pl.col("kl_lower_sum") / 30).iter_rows(named=True)
    ]
    marked = page.locator(".chart desc").nth(1).text_content()
    assert f"median {summary.token_kl['Median KLD']:.4g}" in marked
    assert f"max {summary.token_kl['Maximum KLD']:.4g}" in marked


def test_pointer_and_keyboard_open_both_lists(run: MadeRun, report: Path, opened: Callable[..., Page]) -> None:
    name = run.tokens["source_file"][40]
    page = opened(report, f"#{quote(name)}/0/4")
    assert text(page, "#reader-head") == f"{name}#0"
    page.locator("#text .t").nth(6).hover()
    expect_lists(page, run, 40 + 6)
    page.mouse.move(5, 5)
    expect_lists(page, run, 40 + 4)  # back to the one that is kept
    page.locator("#text").focus()
    page.keyboard.press("ArrowRight")
    expect_lists(page, run, 40 + 5)
    assert page.url.endswith(f"#{quote(name)}/0/5")
    page.keyboard.press("End")
    expect_lists(page, run, 40 + 19)
    page.keyboard.press("ArrowUp")
    assert page.locator("#text").get_attribute("aria-activedescendant") == page.locator(".t.now").get_attribute("id")
    page.keyboard.press("Home")
    expect_lists(page, run, 40)
    page.locator("#text .t").nth(2).click()
    page.mouse.move(5, 5)
    expect_lists(page, run, 42)
    page.get_by_role("button", name="Next largest").click()
    ranked = run.tokens.slice(40, 20)["kl_estimate"].arg_sort(descending=True).to_list()
    expect_lists(page, run, 40 + ranked[(ranked.index(2) + 1) % 20])


def expect_lists(page: Page, run: MadeRun, row: int) -> None:
    """Both lists of a row of the tables, as the panel has them."""
    position = run.tokens["position"][row]
    assert f"position {position}" in text(page, "#lists h3")
    shown = page.locator(".both tbody tr").evaluate_all(
        """rows => rows.map(
            row => [row.cells[1].querySelector('.id')?.textContent, row.cells[0].innerText, row.cells[2].innerText]
        )"""
    )[:-1]
    lists = run.candidates.row(row, named=True)
    p, q = (dict(zip(lists[f"{side}_token_ids"], lists[f"{side}_logprobs"], strict=True)) for side in "pq")
    assert [int(number.removeprefix("id ")) for number, *_ in shown] == sorted(
        {*p, *q}, key=lambda number: -max(p.get(number, -99), q.get(number, -99))
    )
    least = {"p": min(p.values()), "q": min(q.values())}
    for number, *masses in shown:
        for side, known, mass in (("p", p, masses[0]), ("q", q, masses[1])):
            key = int(number.removeprefix("id "))
            assert mass.startswith("≤") is (key not in known)
            stated = float(mass.removeprefix("≤").removesuffix("%")) / 100
            assert stated == pytest.approx(math.exp(known.get(key, least[side])), rel=0.06)


def test_the_table_sorts_searches_and_turns_pages(run: MadeRun, report: Path, opened: Callable[..., Page]) -> None:
    page = opened(report)
    assert text(page, "#found") == "30 of 30 responses"
    assert cells(page)[0][1] == "infinite"
    page.get_by_role("button", name="largest", exact=True).click()
    largest = [float(row[3]) for row in cells(page) if row[3] != "–"]
    assert largest == sorted(largest, reverse=True)
    page.get_by_role("button", name="largest ↓").press("Enter")
    assert page.locator("th[aria-sort=ascending]").inner_text() == "largest ↑"
    page.get_by_role("button", name="Next", exact=True).click()
    assert (text(page, "#page"), len(cells(page))) == ("page 2 of 2", 5)
    page.locator("#search").fill("RÉPONSE 00007")
    assert [row[0] for row in cells(page)] == ["a b/réponse 00007.json#0"]
    page.get_by_role("link", name="a b/réponse 00007.json#0").click()
    assert text(page, "#reader-head") == "a b/réponse 00007.json#0"
    page.locator("#search").fill("שלום")
    token = run.tokens.filter(pl.col("token").str.contains("שלום"))["source_file"].n_unique()
    assert text(page, "#found") == f"{token} of 30 responses"


def test_links_lead_to_positions(run: MadeRun, report: Path, opened: Callable[..., Page]) -> None:
    page = opened(report, "#spread")
    assert page.locator("#reader-head").is_visible()
    worst = page.locator(".most a").nth(1)
    worst.click()
    name, index, position = run.tokens.sort("kl_estimate", descending=True, nulls_last=True).select(
        "source_file", "response_idx", "position"
    ).row(0)  # fmt: skip
    assert page.url.endswith(f"#{quote(name)}/{index}/{position}")
    assert f"position {position}" in text(page, "#lists h3")
    page.evaluate("location.hash = '#a%20b/r%C3%A9ponse%2000011.json/0'")  # no position: its largest
    page.wait_for_function("document.querySelector('#reader-head').textContent.includes('00011')")
    page.evaluate("location.hash = '#a b/réponse 00011.json/0/99'")
    page.wait_for_function("document.querySelector('#lists').textContent.includes('Position 99 is not in this file')")
    page.evaluate("location.hash = '#%E0%A4%A'")
    assert "00011" in text(page, "#reader-head")


def test_what_was_not_measured_is_seen_with_its_reason(run: MadeRun, report: Path, opened: Callable[..., Page]) -> None:
    page = opened(report, f"#{quote(run.tokens['source_file'][0])}/0/5")
    assert "not measured: blocked: service <b>refused</b>" in text(page, "#lists")
    kinds = {at: page.locator("#text .t").nth(at).get_attribute("class") or "" for at in (3, 5, 7, 9)}
    assert ["left-out" in kinds[3], "missing" in kinds[5], "infinite" in kinds[7], "unknown" in kinds[9]] == [True] * 4
    page.locator("#text .t").nth(3).click()
    assert "left out by position sampling" in text(page, "#lists")
    assert all(words in text(page, "#legend") for words in ("not measured", "left out by sampling", "infinite"))
    assert "without limit: at 1 of" in text(page, ".verdict")
    assert "blocked" in text(page, "#verdict table")
    assert "a warning <b>" in text(page, ".warning")
    shades: set[str] = set()
    for number in range(6):
        page.locator("#measure").select_option(str(number))
        shades.add(str(page.locator("#text .t").evaluate_all("all => all.map(t => t.className)")))
    assert len(shades) == 6


def test_hostile_texts_are_texts(tmp_path: Path, opened: Callable[..., Page]) -> None:
    made = made_run(len(HOSTILE), 10)
    names = dict(zip(made.tokens["source_file"].unique(maintain_order=True), HOSTILE, strict=True))
    hostile = pl.Series([HOSTILE[at % len(HOSTILE)] for at in range(made.tokens.height)])
    renamed = pl.col("source_file").replace_strict({old: f"{new}.json" for old, new in names.items()})
    tokens = made.tokens.with_columns(token=hostile, source_file=renamed)
    lists = made.candidates.with_columns(renamed, p_tokens=pl.lit(HOSTILE[:6]), q_tokens=pl.lit(HOSTILE[:5]))
    unread = ResponseInfo("z", None, reason="</script><script>hit=1</script>", error="<img src=x onerror=hit=1>")
    facts = RunFacts("</title><script>hit=1</script>", '"><script>hit=1</script>', "censored", 6, None, (), None)
    prompts = dict.fromkeys(tokens["source_file"], "".join(HOSTILE))
    page = opened(
        MadeRun(tokens, lists, (unread,), facts).write(
            tmp_path / "r.html", record={"warnings": HOSTILE, "config": {"a": "<script>hit=1</script>"}},
            prompts=lambda wanted: {name: prompts[name] for name in wanted},
        )
    )  # fmt: skip
    for number in range(len(HOSTILE)):
        page.locator("#table tbody a").nth(number).click()
        page.locator("#text .t").nth(number).click()
    shown = page.locator("#text").text_content() or ""
    assert all(word in shown for word in HOSTILE if word != "\u202e")
    assert "⟨U+202E⟩" in shown
    assert "\u202e" not in shown + text(page, "#lists") + (page.locator("#prompt .text").text_content() or "")
    assert page.evaluate("typeof hit") == "undefined"
    assert page.locator("script").count() == 4
    assert page.locator("img").count() == 0
    assert page.title().startswith("KL(P‖Q): </title><script>hit=1</script> against")


def test_nothing_but_its_own_script_runs_and_nobody_is_asked(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(f"file://{report}")
    refused = page.evaluate(
        """async () => {
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            document.body.append(Object.assign(document.createElement("script"), { textContent: "window.hit = 1" }));
            document.body.append(Object.assign(document.createElement("img"), { src: "http://127.0.0.1:9/" }));
            await fetch("http://127.0.0.1:9/").catch(() => null);
            await new Promise((done) => setTimeout(done, 50));
            return [window.hit, ...refused.sort()];
        }"""
    )
    assert refused == [None, "connect-src", "img-src", "script-src-elem"]
    page.close()


@pytest.mark.parametrize("width", [375, 1280])
def test_everybody_can_use_it(run: MadeRun, tmp_path: Path, opened: Callable[..., Page], width: int) -> None:
    page = opened(run.write(tmp_path / "r.html", top=4), color_scheme="dark", viewport={"width": width, "height": 800})
    page.locator("summary").first.click()
    for theme in ("dark", "light"):
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        bad = [item for item in found if item["impact"] in ("serious", "critical")]
        assert [(item["id"], item["nodes"][0]["html"]) for item in bad] == []
        page.get_by_role("button", name="theme").click()


def test_without_script_the_verdict_is_read(report: Path, opened: Callable[..., Page]) -> None:
    page = opened(report, java_script_enabled=False, color_scheme="dark")
    assert "Q differs from P" in text(page, ".verdict")
    assert page.locator("noscript p").is_visible()
    assert page.locator(".chart").count() == 5
    assert page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == "rgb(20, 23, 27)"


def test_equal_models_and_a_run_without_lists(tmp_path: Path, opened: Callable[..., Page]) -> None:
    same = made_run(8, 10, spread=0.0)
    page = opened(same.write(tmp_path / "same.html"))
    assert text(page, ".verdict").startswith("No difference between Q and P was found, and at most 0.000001 nats")
    assert page.locator(".most").count() == 0
    page = opened(replace(made_run(8, 10), candidates=None).write(tmp_path / "old.html"))
    assert "kept no lists" in text(page, "#tokens")
    page.locator("#text .t").nth(3).hover()
    assert "This run kept no lists" in text(page, "#lists")


def test_nothing_measured_is_a_page_too(tmp_path: Path, opened: Callable[..., Page]) -> None:
    made = made_run(2, 3)
    unread = ResponseInfo("bad.json", None, reason="no-json", error="not JSON")
    page = opened(MadeRun(made.tokens.clear(), made.candidates.clear(), (unread,)).write(tmp_path / "none.html"))
    assert text(page, ".verdict").startswith("Nothing was measured")
    assert cells(page)[0][:2] + cells(page)[0][-2:] == ["bad.json", "–", "all", "no-json"]
    unknown = [pl.lit(None, dtype=pl.Float64).alias(name) for name in ("kl_estimate", "kl_lower", "kl_upper_plausible")]
    tokens = made.tokens.with_columns(*unknown, reason=pl.lit("blocked"), error=pl.lit("the service refused"))
    no_answer = [
        pl.lit(None).cast(kind).alias(name) for name, kind in made.candidates.schema.items() if name[:2] == "q_"
    ]
    page = opened(MadeRun(tokens, made.candidates.with_columns(no_answer)).write(tmp_path / "refused.html"))
    assert page.locator("#text .missing").count() == 3
    page.locator("#text .t").nth(1).click()
    assert "the service refused" in text(page, "#lists")
    assert page.locator(".both tbody tr").first.inner_text().strip().endswith("no list")


def test_two_thousand_responses_are_a_file_that_opens(tmp_path: Path, opened: Callable[..., Page]) -> None:
    file = made_run(2_000, 30).write(tmp_path / "r.html")
    assert file.stat().st_size < 15e6
    for last in (False, False, True):  # a machine that is busy with other things gets another try
        page = opened(file)
        took = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        if took < 2_000:
            break
        assert not last, took
    assert text(page, "#found") == "2000 of 2000 responses"
    page.locator("#search").fill("01999")
    assert len(cells(page)) == 1
