"""What a run writes down and shows: `metrics.jsonl`, `timing.jsonl` and the progress line.

`metrics.jsonl` holds only what a repeated run reproduces bit for bit, one JSON object a line, each
with its `step`; whatever the clock decides goes to `timing.jsonl`. A resumed run cuts both back to
where its checkpoint stood, so the metrics of an interrupted run end as those of one that was not.
"""

import json
import math
import os
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from herdling.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


class Lines:
    """An append-only file of JSON lines. Each line is one write, so a kill loses at most the last."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._file)

    def write(self, record: dict[str, Any]) -> None:
        text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
        data = memoryview(f"{text}\n".encode())
        while data:
            data = data[os.write(self._file, data) :]

    def place(self) -> int:
        """The length in bytes, once everything written is on the disk."""
        os.fsync(self._file)
        return os.fstat(self._file).st_size

    def cut(self, place: int) -> None:
        """Drop everything after `place` bytes; raises CheckpointError where the file is shorter."""
        size = os.fstat(self._file).st_size
        if size < place:
            raise CheckpointError(
                f"{self.path}: has {size} bytes but the checkpoint was saved at {place}; "
                "remedy: restore the file, or start in another folder"
            )
        os.ftruncate(self._file, place)

    def cut_after(self, step: int) -> None:
        """Drop the first line of a later step, or cut short by a kill, and all that follows it."""
        place = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            place += len(line)
        self.cut(place)


class Metrics:
    """The two files of a run folder. With no folder (a process that is not the main one) a no-op."""

    def __init__(self, folder: Path | None) -> None:
        self._files = {} if folder is None else {n: Lines(folder / n) for n in (METRICS, TIMING)}

    def log(self, step: int, **values: Any) -> None:
        """One line of reproducible numbers, lists or strings; not-finite numbers become strings."""
        self._write(METRICS, step, values)

    def timing(self, step: int, **values: Any) -> None:
        """One line of what the clock and the machine decided."""
        self._write(TIMING, step, values)

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        if name in self._files:
            self._files[name].write({"step": step, **values})

    def place(self) -> int:
        """How long the metrics are, safely on the disk."""
        return self._files[METRICS].place() if self._files else 0

    def rewind(self, step: int, place: int) -> None:
        """Go back to where they stood at `step`, when `place` was theirs; (0, 0) empties both."""
        if self._files:
            self._files[METRICS].cut(place)
            self._files[TIMING].cut_after(step)


def read(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line cut short by a kill is left out."""
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as problem:
            raise DataError(f"{path}:{number}: not valid JSON: {problem}") from None
    return records


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as the strings 'nan', 'inf', '-inf', which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def short(number: float) -> str:
    """A count in at most four digits: 950, 12.3k, 4.56M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """A bar with rate and time left on a terminal, plain lines elsewhere. Writes to stderr.

    Use as a context manager; `update` says how far the work is, `note` prints a line that stays.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, *, show: bool = True, seconds: float = 10.0
    ) -> None:
        self.title, self.total, self.done, self.show = title, total, done, show
        self.seconds = seconds
        """Where there is no terminal: the least time between two lines."""

    def __enter__(self) -> "Progress":
        self._first, self._start = self.done, time.monotonic()
        self._said = -math.inf
        self._bar = None
        if self.show:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
            if self._console.is_terminal:
                self._open_bar()
        return self

    def restart(self, done: int) -> None:
        """Say where the work really begins: what was done before does not count for the pace."""
        self.done = self._first = done
        self._start = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            self._bar.reset(self._task, completed=done)

    def _open_bar(self) -> None:
        from rich import progress

        columns: tuple[str | ProgressColumn, ...] = (
            "{task.description}",
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            "{task.fields[text]}",
            "eta",
            progress.TimeRemainingColumn(compact=True),
        )
        self._bar = progress.Progress(*columns, console=self._console, refresh_per_second=4)
        self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, text="")
        self._bar.start()

    def update(self, done: int, text: str = "") -> None:
        """Say that `done` of `total` is behind us, with a few words about it."""
        self.done = done
        if not self.show:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._said >= self.seconds or done >= self.total:
            self._said = now
            pace = (now - self._start) / max(done - self._first, 1)
            left = clock(pace * (self.total - done))
            self._line(f"{self.title} {done}/{self.total}  {text}  eta {left}")

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self.show:
            self._line(line)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
