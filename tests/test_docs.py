"""What README and docs show runs, in a folder with tiny models, or is marked as not run; the site builds."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from family import make_rows
from staff import cli, flags

ROOT = Path(__file__).parents[1]
FIRST = ("docs/index.md", "docs/data.md", "docs/drafts.md", "docs/compare.md", "docs/faq.md", "README.md")
PAGES = [*FIRST, *sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {*FIRST})]
PROGRAMS = ("staff", "make", "pip", "python", "torchrun", "sbatch", "docker", "embedding-atlas")
MARK = "<!-- not run"


def blocks(page):
    """(language, lines, is it marked) of every fenced block."""
    lines, inside, before = [], None, ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside is None:
                inside, lines = line[3:].strip(), []
                continue
            yield inside, lines, before.startswith(MARK)
            inside = None
        elif inside is not None:
            lines.append(line)
        if line.strip() and inside is None:
            before = line


def commands(page, marked=False):
    """The command lines of a page's blocks that are (not) marked."""
    return [
        line
        for language, lines, is_marked in blocks(page)
        for line in lines
        if language in ("", "bash") and line.split(" ")[0] in PROGRAMS and is_marked == marked
    ]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    place = tmp_path_factory.mktemp("docs")
    for name, n in (("train", 40), ("test", 2), ("validation", 4)):
        rows = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(make_rows(n))]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def with_tiny_models(line, family):
    small = {"T": "target", "Qwen/Qwen2.5-7B": "target"} | dict.fromkeys(
        ("D", "A", "B", "Qwen/Qwen2.5-0.5B"), "draft"
    )
    return [str(family / small[w]) if w in small else w for w in shlex.split(line, comments=True)]


def test_every_command_of_the_docs_runs(folder, family, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    done = set()
    for page in PAGES:
        for line in commands(page):
            program, name, *words = with_tiny_models(line, family)
            assert program == "staff", f"{page}: mark the block of {line!r} with {MARK}: why -->"
            if (name, *words) in done:
                continue
            done.add((name, *words))
            try:
                cli.COMMANDS[name](words)
            except (ValueError, SystemExit) as error:
                pytest.fail(f"{page}: {line}: {error}")
    assert (folder / "runs" / "x" / "coreset.jsonl").exists()
    assert len(done) > 10
    for page in PAGES:
        for language, lines, is_marked in blocks(page):
            if language == "python" and page != "README.md" and not is_marked:
                exec(compile(of_tiny_models("\n".join(lines), family), page, "exec"), {})


def of_tiny_models(code, family):
    for name, model in (("T", "target"), ("D", "draft")):
        code = code.replace(f'"{name}"', repr(str(family / model)))
    return code


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_is_not_run_is_one_that_there_is(page):
    for line in commands(page, marked=True):
        program, name, *words = shlex.split(line, comments=True)
        if program == "staff" and name in cli.COMMANDS:
            flags.parse(cli._parser(name), words)


def test_links_of_the_readme_are_files_and_work_from_an_index():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", readme) if not link.startswith("http")]
    assert links
    assert all((ROOT / link.partition("#")[0]).exists() for link in links)
    ask = [sys.executable, "setup.py", "--long-description"]
    for url, wanted in (
        ("", "`docs/drafts.md`"),
        ("https://h/o/r", "](https://h/o/r/blob/main/docs/drafts.md)"),
    ):
        said = subprocess.run(
            ask, cwd=ROOT, env={"STAFF_URL": url, "PATH": "/bin"}, capture_output=True, text=True, check=True
        ).stdout
        assert wanted in said
        assert "](docs/" not in said


def test_the_site_builds_without_a_warning(tmp_path):
    assert shutil.which("mkdocs", path=str(Path(sys.executable).parent))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("staff.select", "staff.select_grid", "staff.runs.outputs.Run", "staff.types.Region"):
        assert f'id="{name}"' in page
