"""report.html and comparison.html as files: what they say of each kind of run, and that they fail none."""

import dataclasses
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import staff
from family import run_staff, write_pool
from reporting import HOSTILE, finish_run, write_rows
from staff.report import facts as told
from staff.report import figures, notebook
from staff.report.run_page import run_page
from staff.runs import reports


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A run with everything: regions, verification, a source, hostile rows."""
    folder = tmp_path_factory.mktemp("report")
    data = write_rows(folder / "pool.jsonl", 600, source=lambda i: ("books", "web", "chat")[i % 3])
    run = finish_run(folder / "x", data)
    return run, reports.report_run(run.path).read_text(encoding="utf-8")


def page_of(folder):
    return reports.report_run(folder).read_text(encoding="utf-8")


def words(page):
    """What a person reads of a page before any script has run."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", page)))


def test_the_page_says_first_what_was_kept_what_it_cost_and_whether_to_trust_it(verified):
    _, page = verified
    said = words(page)
    assert "120 of 600 samples kept." in said
    assert "0.30 passes" in said
    assert "fine-tuning on the whole pool, 3 epochs" in said
    assert re.search(r"Is the draft to be trusted\? (good|usable|poor|unknown)", said)
    assert "3 prompts lost the start of their text" in said


def test_the_page_fetches_nothing_and_names_every_script_by_its_digest(verified):
    _, page = verified
    bare = re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1", page)
    assert not re.search(r"<(link|img|iframe|script)[^>]+(src|href)=", bare)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert policy.count("sha256-") == len(re.findall(r"<script>", page)) == 4


def test_no_text_of_a_row_is_markup_in_the_page(verified):
    _, page = verified
    assert "window.hurt" not in page
    assert HOSTILE[:20] not in page


def test_a_run_of_every_kind_has_its_page(tmp_path):
    data = write_rows(tmp_path / "pool.jsonl", 80, source=lambda i: f"{i % 4}{HOSTILE}")
    scores = tmp_path / "scores.npy"
    np.save(scores, np.random.default_rng(0).random(80))
    staff.select(str(data), method="random", pruning_rate=0.5, output=tmp_path / "random")
    assert "drawn at random" in words(page_of(tmp_path / "random"))
    staff.select(
        str(data),
        scores=str(scores),
        method="staff",
        pruning_rate=0.5,
        group_by="source",
        dedup="exact",
        output=tmp_path / "groups",
    )
    said = page_of(tmp_path / "groups")
    assert words(said).count("Samples by region") >= 4
    assert "onerror=" not in re.sub(r"(?s)<script.*?</script>", "", said).replace("onerror=&#x27;", "")
    staff.select_grid(
        str(data),
        methods=("random", "staff"),
        pruning_rates=(0.5, 0.8),
        scores=str(scores),
        output=tmp_path / "grid",
    )
    grid = page_of(tmp_path / "grid")
    assert grid.count("<article") == 4
    assert "staff, 80% pruned" in words(grid)
    assert page_of(tmp_path / "grid" / "staff-0.5").count("<article") == 1


def test_strata_that_are_no_intervals_are_clusters(verified):
    run, _ = verified
    clusters = [dataclasses.replace(r, lower=np.nan, upper=np.nan) for r in run.selection.regions]
    cell = dataclasses.replace(run.facts, regions=clusters)
    said = words(run_page([cell], {}, None))
    assert "A region holds samples that are alike" in said
    assert "no. 1 " in said
    assert [r["from"] for r in told.strata(cell)][:2] == ["1", "2"]
    chart = notebook.regions(cell).to_dict()
    assert chart["vconcat"][0]["layer"][0]["encoding"]["x"]["axis"]["title"] == "cluster"


@pytest.mark.parametrize("n", [2, 10])
def test_a_tiny_pool_has_its_page(tmp_path, n):
    run = finish_run(
        tmp_path / "x", write_rows(tmp_path / "pool.jsonl", n), rate=0.5, num_regions=2, verification_budget=2
    )
    assert f"{n // 2} of {n} samples kept" in words(page_of(run.path))


def test_plain_texts_have_their_page(tmp_path):
    data = tmp_path / "pool.jsonl"
    data.write_text("".join(json.dumps({"text": f"a text of its own, {i}"}) + "\n" for i in range(30)))
    staff.select(str(data), method="random", pruning_rate=0.5, output=tmp_path / "x")
    assert "15 of 30 samples kept" in words(page_of(tmp_path / "x"))


def test_the_pool_that_changed_or_is_gone_leaves_the_text_of_what_was_kept(tmp_path):
    data = write_rows(tmp_path / "pool.jsonl", 60)
    run = finish_run(tmp_path / "x", data, rate=0.5)
    assert "each with its text" in words(page_of(run.path))
    data.write_text(data.read_text() + "\n")
    assert "30 of them with their text. The data is not where it was, or has changed" in words(
        page_of(run.path)
    )
    data.unlink()
    assert "30 of them with their text" in words(page_of(run.path))


def test_the_page_is_under_3_mb_and_made_within_5_seconds_for_20000_rows(tmp_path):
    run = finish_run(tmp_path / "x", write_rows(tmp_path / "pool.jsonl", 20_000, words=120))
    began = time.monotonic()
    page = reports.report_run(run.path)
    assert time.monotonic() - began < 15  # 5 seconds on a quiet machine
    assert 2_500_000 < page.stat().st_size < 3_000_000
    said = words(page.read_text(encoding="utf-8"))
    (with_text,) = re.findall(r"holds all 20,000 rows, ([\d,]+) of them with their text", said)
    assert int(with_text.replace(",", "")) > 1000


def test_staff_select_ends_with_its_page_and_staff_report_makes_it_again(family, tmp_path):
    data = write_pool(tmp_path / "pool.jsonl")
    models = ["--target", family / "target", "--draft", family / "draft"]
    done = run_staff("select", "--data", data, *models, "--pruning-rate", "0.7", "--output", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    page = tmp_path / "x" / "report.html"
    assert str(page) in done.stdout
    first = page.read_bytes()
    assert b"18 of 60 samples kept" in first
    page.unlink()
    again = run_staff("report", tmp_path / "x")
    assert again.returncode == 0, again.stderr
    assert page.read_bytes() == first


def test_a_page_that_fails_fails_no_run(tmp_path, monkeypatch, caplog):
    data = write_rows(tmp_path / "pool.jsonl", 20)
    run = staff.select(str(data), method="random", pruning_rate=0.5, output=tmp_path / "x")
    monkeypatch.setattr(reports, "_pool_again", lambda *_: 1 / 0)
    monkeypatch.setattr("staff.report.run_page.run_page", lambda *_: 1 / 0)
    assert reports.try_report(run.path, [run]) is None
    assert "report.html could not be made (ZeroDivisionError" in caplog.text


def test_a_notebook_shows_the_same_charts_and_a_summary_with_a_picture(verified):
    run, _ = verified
    for chart in (
        run.plot_regions(),
        run.plot_fidelity(),
        run.plot_shares("loss"),
        run.plot_samples("effort", "loss"),
    ):
        json.dumps(chart.to_dict())  # Altair checks it against Vega-Lite's schema
    html = run._repr_html_()
    assert "<svg" in html
    assert "120 of 600" in html
    assert "script" not in html
    assert run.scores.num_rows == 600


def test_what_can_not_be_drawn_is_said(tmp_path):
    run = staff.select(
        [{"prompt": f"p{i}", "response": "r"} for i in range(20)], method="random", pruning_rate=0.5
    )
    with pytest.raises(ValueError, match="random has no regions"):
        run.plot_regions()
    with pytest.raises(ValueError, match="nothing was verified"):
        run.plot_fidelity()
    with pytest.raises(ValueError, match="there is no column 'loss'"):
        run.plot_shares("loss")
    assert "<svg" not in run._repr_html_()


@pytest.mark.parametrize(
    "kind",
    [
        "region_sizes",
        "region_budgets",
        "region_ratios",
        "two_scores",
        "every_sample",
        "shares_along",
        "shares_by",
        "paired_differences",
        "qualities",
    ],
)
def test_every_chart_is_one_that_vega_lite_knows(kind):
    arguments = {
        "two_scores": ("draft", "target", True),
        "every_sample": ("effort", "loss", ("effort", "loss"), (True, False)),
        "paired_differences": (),
        "qualities": ("beside", "ROUGE-L", "passes", "cost"),
    }
    assert (
        getattr(figures, kind)("table", *arguments.get(kind, ("a title",)))
        .to_dict()["$schema"]
        .startswith("https://vega")
    )


def test_bins_hold_every_row_once():
    rng = np.random.default_rng(0)
    for values in (
        rng.lognormal(0, 2, 1000),
        rng.integers(1, 5, 1000),
        np.full(9, 3.0),
        np.array([np.nan, 1, 2, 1e6]),
        np.arange(-5, 5),
    ):
        kept = rng.random(len(values)) < 0.3
        bins = told.bins_of(values, kept)
        is_known = np.isfinite(values.astype(float))
        assert sum(each["size"] for each in bins) == is_known.sum()
        assert sum(each["kept"] for each in bins) == (kept & is_known).sum()
        for each in bins:
            inside = (values >= each["low"]) & (values < each["high"])
            assert inside.sum() == each["size"]


def test_edges_are_told_apart_however_near_they_lie():
    for lower, width in ((0.0, 1e-7), (5.6, 0.22), (1e6, 1.0), (0.0, 3000.0), (-1.0, 0.5)):
        edges = told._edges([(lower + i * width, lower + (i + 1) * width) for i in range(20)])
        assert len({low for low, _ in edges}) == 20


def test_a_report_needs_no_torch(verified):
    run, _ = verified
    code = f"import sys; sys.argv = ['staff', 'report', {str(run.path)!r}]\nfrom staff.cli import main\nmain()\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
