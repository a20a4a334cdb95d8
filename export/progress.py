"""Stages of a build: progress bars for people, seconds for machines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Report:
    """Stages with progress on stderr (rich), or without where `quiet`. `seconds` adds up by the stage's name.

    Bars are shown from the first stage that may take long: what is refused before is one line on a clean terminal.
    """

    def __init__(self, quiet: bool):
        columns = TextColumn("{task.description:32}"), BarColumn(24), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn()
        self.progress = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    @contextmanager
    def stage(self, name: str, total: float = 1, shown: bool = True) -> Iterator[Callable[[float], None]]:
        """Times a stage; yields a function that advances its bar. Not `shown`: it starts no display by itself."""
        start, task = time.monotonic(), self.progress.add_task(name, total=total)
        if shown:
            self.progress.start()
        yield lambda amount: self.progress.advance(task, amount)
        self.progress.update(task, completed=total)
        self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - start, 3)
