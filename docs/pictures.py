"""docs/report.png and docs/comparison.png: the tops of two pages, taken in a browser without a window.

make demo                           # runs/demo, of examples/medquad
.venv/bin/staff report experiments/first/results
.venv/bin/python docs/pictures.py   # needs chromium (make chromium)
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
PAGES = {
    "report": (HERE.parent / "runs" / "demo" / "report.html", 1450),
    "comparison": (HERE.parent / "experiments" / "first" / "results" / "comparison.html", 1010),
}


def take(folder: Path) -> None:
    """Write a picture of each page into a folder."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (path, height) in PAGES.items():
            page = browser.new_page(viewport={"width": 1060, "height": height})
            page.goto(path.resolve().as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            page.screenshot(path=folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]) if sys.argv[1:] else HERE)
