"""Stages as bars with the time left; plain lines where the output is no terminal."""

from __future__ import annotations

from typing import Any


class Bars:
    """Shows stages as bars with the time left; plain lines where the output is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, quiet=quiet)
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        if self._console.is_terminal and not self._console.quiet:
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
            )
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
            return
        if total <= 1:
            if done == 0:
                self._console.print(stage, highlight=False, markup=False)
            return
        before = self._tasks.get(stage, -1)
        tenth = 10 * done // max(total, 1)
        if tenth > before:
            self._tasks[stage] = tenth
            self._console.print(f"{stage}: {done} of {total}", highlight=False, markup=False)
