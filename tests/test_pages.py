"""The pages in a real browser: Debian's chromium without a window, driven by Playwright."""

import shutil
from pathlib import Path

import pytest

import staff
from reporting import HOSTILE, finish_run, make_comparison, write_rows
from staff.comparison import tables
from staff.runs import reports

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(__file__).parent / "axe" / "axe.min.js"
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: `make chromium` installs Debian's"
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page, as (path, **settings of the browser) -> the page once it has drawn; in the end nothing
    may have been said to the console, or asked of a network."""
    opened = []

    def open_page(path, **settings):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        page, complaints = context.new_page(), []
        page.set_default_timeout(10_000)
        page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on(
            "request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or complaints.append(r.url)
        )
        page.on("dialog", lambda dialog: complaints.append("a dialog"))
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)
        opened.append((context, complaints))
        return page

    yield open_page
    for context, complaints in opened:
        context.close()
        assert complaints == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a run with everything, hostile rows and labels among it."""
    folder = tmp_path_factory.mktemp("pages")
    data = write_rows(folder / "pool.jsonl", 600, source=lambda i: ("books", "web", f"chat {HOSTILE}")[i % 3])
    return reports.report_run(finish_run(folder / "x", data).path)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = make_comparison(tmp_path_factory.mktemp("comparison"))
    tables.report(folder, {"qa": ("rougeL", "loss"), "chat": ("rougeL",)})
    return folder / "comparison.html"


def rows_of(page):
    return page.locator("#rows tr.row").count()


def counted(page):
    """How many rows the filters leave."""
    return int(page.locator("#count").inner_text().split(" of ")[0].replace(",", ""))


def marks(page, chart, kind):
    return page.locator(f'figure[data-chart="{chart}"] .mark-{kind}:not(.role-legend-symbol) path').count()


def test_every_chart_has_drawn_its_marks(visit, report):
    page = visit(report)
    for plot in page.locator("figure:visible .plot").all():
        assert plot.locator("svg, canvas").count() >= 1
    regions = page.locator('figure[data-chart="region_sizes-0-1"] tbody tr').count()
    bars = page.locator('figure[data-chart="region_sizes-0-1"] svg .mark-rect.role-mark path').count()
    assert bars == 2 * regions > 10
    shown = page.locator('figure[data-chart="two_scores-0"] svg .mark-symbol.role-mark path').count()
    assert shown == page.locator('figure[data-chart="two_scores-0"] tbody tr').count() > 50
    assert page.locator('figure[data-chart="every_sample-0"] svg .mark-symbol.role-mark path').count() == 600


def test_search_sort_filter_and_rows_by_mouse(visit, report):
    page = visit(report)
    assert (counted(page), rows_of(page)) == (600, 50)
    page.get_by_label("Search").fill("question 17:")
    assert counted(page) == 1
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Kept or dropped").select_option("kept")
    assert counted(page) == 120
    page.get_by_role("button", name="effort", exact=True).click()  # the highest first
    efforts = [float(text) for text in page.locator("#rows tr.row td.number:not(.less)").all_inner_texts()]
    assert efforts == sorted(efforts, reverse=True)
    page.locator("#rows tr.row").first.click()
    assert page.locator("tr.full h4").all_inner_texts() == ["Prompt", "Response (the loss is taken on it)"]
    page.locator("#rows tr.row").first.click()
    assert page.locator("tr.full").count() == 0
    page.get_by_role("button", name="Next").click()
    assert "page 2 of 3" in page.locator("#pages").inner_text()


def test_a_click_on_a_bar_or_a_point_filters_the_table(visit, report):
    page = visit(report)
    bar = page.locator('figure[data-chart="region_sizes-0-1"] svg .mark-rect.role-mark path').nth(4)
    bar.click()
    size = (
        page.locator('figure[data-chart="region_sizes-0-1"] tbody tr')
        .nth(4)
        .locator("td")
        .first.text_content()
    )
    assert counted(page) == int(size)
    page.get_by_role("button", name="Show all").click()
    assert counted(page) == 600
    page.locator('figure[data-chart="loss-0"] svg .mark-rect.role-mark path').nth(3).click()
    size = page.locator('figure[data-chart="loss-0"] tbody tr').nth(3).locator("td").first.text_content()
    assert counted(page) == int(size)
    page.locator("button.chip").click()
    assert counted(page) == 600
    page.locator('figure[data-chart="source-0"] svg .mark-rect.role-mark path').nth(1).click()
    assert counted(page) == 200
    page.locator('figure[data-chart="two_scores-0"] svg .mark-symbol.role-mark path').nth(3).click()
    assert page.locator("tr.full").count() == 1


def test_all_of_it_by_keyboard(visit, report):
    page = visit(report)
    page.get_by_label("Search").focus()
    page.keyboard.type("r59")
    assert counted(page) == 11
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # the first region
    assert 0 < counted(page) < 11 or counted(page) == 0
    page.get_by_role("button", name="Show all").focus()
    page.keyboard.press("Enter")
    page.locator("#rows button.open").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("tr.full").count() == 1
    assert page.locator("#rows button.open").first.get_attribute("aria-expanded") == "true"
    page.get_by_role("button", name="loss", exact=True).focus()
    page.keyboard.press("Enter")
    assert page.locator('#rows th[aria-sort="descending"]').inner_text() == "loss ↓"
    figures = page.locator("figure > details > summary").first
    figures.focus()
    page.keyboard.press("Enter")
    assert page.locator("figure table.figures").first.is_visible()


def test_hostile_rows_run_nothing_and_are_shown_as_they_are(visit, report):
    page = visit(report)
    page.get_by_label("Search").fill("question 3:")
    page.locator("#rows tr.row").first.click()
    said = page.locator("tr.full pre").first.inner_text()
    assert "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'> {{7*7}} ${7*7}" in said
    assert "\\u202eturned\\u202c \\u001b[31mred\\u0007" in said
    page.locator('figure[data-chart="source-0"] svg .mark-rect.role-mark path').nth(2).hover()
    assert page.locator("#vg-tooltip-element b").count() == 0
    assert page.locator("img, #rows script").count() == 0
    assert page.evaluate("() => window.hurt") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_accessibility_checker_finds_nothing_serious(visit, request, name, scheme):
    page = visit(request.getfixturevalue(name), color_scheme=scheme, bypass_csp=True)
    for summary in page.locator("figure:visible > details > summary").all()[:3]:
        summary.click()
    if name == "report":
        page.locator("#rows tr.row").first.click()
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations")
    serious = [
        f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_nothing_is_wider_than_a_phone_and_all_is_there_in_print(visit, report, comparison):
    for path in (report, comparison):
        page = visit(path, viewport={"width": 360, "height": 740})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page = visit(report)
    page.emulate_media(media="print")
    assert page.locator("#filters").is_hidden()
    assert page.locator("figure svg").first.is_visible()


def test_a_pool_of_20000_rows_is_usable_within_3_seconds(visit, tmp_path):
    path = reports.report_run(
        finish_run(tmp_path / "x", write_rows(tmp_path / "pool.jsonl", 20_000, 120)).path
    )
    page = visit(path)
    took = page.evaluate("() => performance.getEntriesByName('ready')[0].startTime")
    print(f"20,000 rows: {took / 1000:.1f} s, {path.stat().st_size:,} bytes")  # noqa: T201
    assert took < 9000  # 3 seconds on a quiet machine
    page.get_by_label("Kept or dropped").select_option("kept")
    assert counted(page) == 4000


def test_a_run_with_several_coresets_shows_the_one_that_is_chosen(visit, tmp_path):
    data = write_rows(tmp_path / "pool.jsonl", 90)
    staff.select_grid(str(data), methods=("random",), pruning_rates=(0.5, 0.9), output=tmp_path / "x")
    page = visit(reports.report_run(tmp_path / "x"))
    assert page.locator("h2:visible").first.inner_text().startswith("45 of 90 samples kept")
    page.get_by_label("Coreset shown below").select_option("random, 90% pruned")
    assert page.locator("h2:visible").first.inner_text().startswith("9 of 90 samples kept")
    page.get_by_label("Kept or dropped").select_option("kept")
    assert counted(page) == 9


def test_a_comparison_shows_the_task_metric_and_methods_that_are_chosen(visit, comparison):
    page = visit(comparison)
    points = page.locator('figure[data-chart="differences"] svg .mark-symbol.role-mark path')
    assert points.count() == 2 * 2  # two methods beside random, two rates
    assert page.locator('figure[data-chart="differences"] tbody tr').count() == 4
    page.get_by_label("Metric").select_option("loss (lower is better)")
    assert (
        page.locator('figure[data-chart="pruning_rate"] svg.marks')
        .text_content()
        .count("loss (lower is better)")
        >= 1
    )
    page.get_by_role("checkbox", name="staff").uncheck()
    assert points.count() == 2
    page.get_by_label("Task").select_option("chat")
    assert points.count() == 2
    page.get_by_text("cells, a model each").click()
    assert page.get_by_role("table", name="Cells").locator("tbody tr").count() == 2 * (2 * 2 * 3 + 1 + 2)
