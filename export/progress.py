"""Stages of a build: progress bars for people, seconds for machines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text


class Report:
    """Stages with progress on stderr (rich), or without where `quiet`. `seconds` adds up by the stage's name.

    Bars are shown from the first stage that may take long: what is refused before is one line on a clean terminal.
    """

    def __init__(self, quiet: bool):
        columns = TextColumn("{task.description:28}"), BarColumn(14), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn()
        console, speed = Console(stderr=True), _Speed(Column(no_wrap=True))  # 80 characters in all
        self.progress = Progress(*columns, speed, console=console, disable=quiet, speed_estimate_period=10)
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def note(self, text: str) -> None:
        """A word for the user, once: to the terminal, or into `notes` for machines."""
        if text not in self.notes:
            self.notes.append(text)
            if not self.progress.disable:
                self.progress.console.print(f"note: {text}", style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: float = 1, shown: bool = True, unit: str = "") -> Iterator[Callable[[float], None]]:
        """Times a stage; yields a function that advances its bar, from any thread. Not `shown`: it starts no display by itself.

        unit: "bytes" where `total` counts those: their speed is shown, and the time that is left.
        """
        start, task = time.monotonic(), self.progress.add_task(name, total=total, unit=unit)
        if shown:
            self.progress.start()
        yield lambda amount: self.progress.advance(task, amount)
        self.progress.update(task, completed=total)
        self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - start, 3)


class _Speed(ProgressColumn):
    """What counts bytes says "512 MB/s, 0:42 left"."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if task.fields.get("unit") != "bytes" or not speed:
            return Text("")
        left = task.time_remaining
        minutes = "" if task.finished or left is None else f", {int(left) // 60}:{int(left) % 60:02} left"
        return Text(f"{speed / 1e6:.0f} MB/s{minutes}")
