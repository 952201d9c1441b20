"""The `checkpoints/` folder of a run: one complete folder a checkpoint, the last few kept.

A checkpoint appears by a rename and disappears by one, so that whatever `step-*` is there is whole.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from herdling.files import atomic_folder


class Checkpoints:
    """The last `keep` checkpoints, and for ever those at multiples of `permanent` steps (0: none)."""

    def __init__(self, folder: Path, keep: int = 2, permanent: int = 0) -> None:
        self.folder, self.keep, self.permanent = folder, keep, permanent

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        names = (p.name.removeprefix("step-") for p in self.folder.glob("step-*") if p.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Yield a folder to fill; it becomes the checkpoint of `step`, and old ones go."""
        with atomic_folder(self.path(step)) as folder:
            yield folder
        for old in self._surplus():
            gone = self.folder / f".{self.path(old).name}.gone"
            self.path(old).rename(gone)
            shutil.rmtree(gone)

    def _surplus(self) -> list[int]:
        passing = [s for s in self.steps() if not (self.permanent and s % self.permanent == 0)]
        return passing[: -self.keep]

    def sweep(self) -> None:
        """Remove what a killed process left half written or half deleted."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
