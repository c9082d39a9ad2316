"""A page in one file: what it says, its charts' specifications and its data, and the scripts that draw them.
Nothing is fetched, and text from data is never markup."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from staff.data.layouts import visible

logger = logging.getLogger(__name__)

LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")


def escaped(value: Any) -> str:
    """Text as it stands, whatever is in it: no markup, no turned writing, no control characters."""
    return html.escape(visible(str(value)))


def gzipped(text: str) -> str:
    """Text as gzip in base64: a third of its size, and no script tag can end it."""
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), 6, mtime=0)).decode()


@cache
def asset(name: str) -> str:
    """A file of this package, without the address of what a debugger would fetch."""
    text = (files("staff.report") / "assets" / name).read_text(encoding="utf-8")
    return text.partition("\n//# sourceMappingURL")[0]


def whole_page(title: str, body: str, data: Mapping[str, str], script: str) -> str:
    """The page.

    Args:
        title: as text.
        body: as HTML.
        data: id -> what a script reads, as `gzipped` gives it.
        script: the name of the asset that draws.
    """
    licences = f"/*\n{asset('LICENSES.txt')}\n*/\n"
    scripts = [licences + asset(name) if name == LIBRARIES[0] else asset(name) for name in LIBRARIES]
    scripts.append(f"{asset('charts.js')}\n{asset(script)}")
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts)
    # styles are set by the libraries as they draw; scripts are these and no others
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    policy += "base-uri 'none'; form-action 'none'"
    kind = 'type="application/gzip"'
    blocks = "".join(f'<script {kind} id="{name}">{packed}</script>' for name, packed in data.items())
    loaded = "\n".join(f"<script>{text}</script>" for text in scripts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>{asset('page.css')}</style>\n</head>\n<body>\n{body}\n"
        f"{blocks}{loaded}\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def table_of(header: Sequence[str], lines: Iterable[Sequence[Any]], caption: str) -> str:
    """A table; the first cell of a line names it. Numbers stand to the right."""
    head, about = "".join(f'<th scope="col">{escaped(name)}</th>' for name in header), escaped(caption)
    rows = []
    for first, *rest in lines:
        cells = "".join(f"<td>{escaped(value)}</td>" for value in rest)
        rows.append(f'<tr><th scope="row">{escaped(first)}</th>{cells}</tr>')
    scrolls = f'class="scroll" tabindex="0" role="region" aria-label="{about}"'
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div {scrolls}><table class="figures"><caption>{about}</caption>{body}</table></div>'


def figure_of(chart: str, heading: str, about: str, table: str) -> str:
    """A place for a chart, what it shows, and its figures as a table.

    Args:
        chart: its name in the page's data.
        about, table: as HTML.
    """
    return (
        f'<figure data-chart="{chart}"><figcaption><h3>{escaped(heading)}</h3><p>{about}</p></figcaption>'
        f'<div class="plot"></div>'
        f"<details><summary>Its figures as a table</summary>{table}</details></figure>"
    )


def section_of(heading: str, *parts: str, kind: str = "", id: str = "") -> str:
    """A section: its heading as text, its parts as HTML."""
    names = f' class="{kind}"' * bool(kind) + f' id="{id}"' * bool(id)
    return f"<section{names}><h2>{escaped(heading)}</h2>{''.join(parts)}</section>"


def bars_of(lines: Sequence[tuple[str, float, str]], caption: str) -> str:
    """Horizontal bars to one scale: name, length, what stands behind it."""
    longest = max((length for _, length, _ in lines), default=0) or 1
    rows = ""
    for name, length, text in lines:
        bar = f'<span class="bar" style="--part:{length / longest:.4f}"></span>'
        rows += f'<tr><th scope="row">{escaped(name)}</th><td>{bar}</td><td>{escaped(text)}</td></tr>'
    return f'<table class="bars"><caption>{escaped(caption)}</caption><tbody>{rows}</tbody></table>'


def made_or_said(path: Path, make: Callable[[], object]) -> Path | None:
    """Make a page; what is wrong with it is a warning and fails nothing.

    Returns:
        the page, None where there is none.
    """
    try:
        make()
        return path
    except Exception as error:
        logger.warning("%s could not be made (%s: %s); all else is whole", path, type(error).__name__, error)
        logger.debug("traceback", exc_info=True)
        return None


def compact(value: Any) -> str:
    """JSON without spaces, and without nan."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
