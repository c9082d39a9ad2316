"""Stages as bars with the time left, in a terminal and in a notebook; plain lines in another output."""

from __future__ import annotations

import html
import time
from datetime import timedelta
from typing import Any

NOTEBOOK_SECONDS = 0.2  # a notebook is sent no more than that often


class Bars:
    """Shows how far each stage is.

    Args:
        quiet: show nothing.
        lines: in an output that is neither a terminal nor a notebook, a line at every tenth of a stage.
    """

    def __init__(self, quiet: bool = False, lines: bool = True) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, quiet=quiet)
        self._lines = lines
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._cell: Any = None  # what a notebook's output is changed by
        self._told: dict[str, tuple[int, int, str]] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._shown = 0.0

    def __enter__(self) -> Bars:
        if self._console.quiet:
            return self
        if self._console.is_jupyter:
            from IPython.display import HTML, display

            self._cell = display(HTML(""), display_id=True)
        elif self._console.is_terminal:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description:22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()
        self._show()

    def __call__(self, stage: str, done: int, total: int, figures: str = "") -> None:
        """Show one stage.

        Args:
            figures: what else there is to say of it now.
        """
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, figures=figures)
            self._bars.update(self._tasks[stage], completed=done, total=total, figures=figures)
            return
        now = time.monotonic()
        self._began.setdefault(stage, (now, done))
        self._told[stage] = done, total, figures
        if self._cell:
            if now - self._shown >= NOTEBOOK_SECONDS:
                self._shown = now
                self._show()
        elif self._lines and total <= 1:
            if done == 0:
                self._console.print(stage, highlight=False, markup=False)
        elif self._lines:
            before = self._tasks.get(stage, -1)
            tenth = 10 * done // max(total, 1)
            if tenth > before:
                self._tasks[stage] = tenth
                said = ", ".join(part for part in (f"{done} of {total}", self._left(stage), figures) if part)
                self._console.print(f"{stage}: {said}", highlight=False, markup=False, soft_wrap=True)

    def _left(self, stage: str) -> str:
        """The time that a stage still takes, by what it took so far; "" where that is not known yet."""
        (began, first), (done, total, _) = self._began[stage], self._told[stage]
        if not first < done < total:
            return ""
        seconds = (time.monotonic() - began) / (done - first) * (total - done)
        return f"{timedelta(seconds=round(seconds))} left"

    def _show(self) -> None:
        if self._cell:
            from IPython.display import HTML

            rows = [
                f"<tr><td>{html.escape(stage)}</td><td><progress value={done} max={max(total, 1)}></progress>"
                f"</td><td>{done} of {total}</td><td>{self._left(stage)}</td><td>{html.escape(figures)}</td>"
                for stage, (done, total, figures) in self._told.items()
            ]
            self._cell.update(HTML(f"<table>{'</tr>'.join(rows)}</table>"))
