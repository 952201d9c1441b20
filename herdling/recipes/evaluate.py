"""`herdling evaluate`: a model's accuracy on tasks, built-in or one's own, beside the chance level.

    herdling evaluate runs/demo/model --tasks read_number,arithmetic --items 200 --json scores.json

    herdling evaluate runs/demo/model --tasks my_task.py:MyTask,capitals.jsonl

Only test items are asked, which no built-in training data contains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from herdling.config import nearest
from herdling.errors import ConfigError, InputError
from herdling.files import check_file, write_json


@dataclass(frozen=True)
class Config:
    """Measure a model on tasks."""

    path: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model folder or hub name."""
    adapter: str | None = None
    """Folder of an adapter for it, in peft's format."""
    tasks: str = "all"
    """Names, FILE.py:Class or FILE.jsonl, commas between; `all`: built-in ones that the model can take."""
    items: int = 200
    """Test items of each task."""
    max_tokens: int = 64
    """Most tokens of a reply."""
    seed: int = 0
    """Which test items are drawn."""
    json: Path | None = None
    """Also write the results, with some replies, to this file."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: the folder's own."""
    device: str | None = None
    """Where to run, for example cpu or cuda; default: a GPU if there is one."""


HEADER = (
    f"{'task':<16} {'accuracy':>8}  {'95 % interval':>14}  {'chance':>6}  {'items':>5}  seconds"
)


def main(config: Config) -> None:
    """Print one line a task, and write the JSON file. Raises Error for a task that cannot be asked."""
    from herdling.tasks import sandbox
    from herdling.tasks.registry import IMAGE_TASKS, TASKS, open_task

    asked = names(config.tasks, tuple(TASKS))
    if config.items < 1 or config.max_tokens < 1:
        raise ConfigError(
            f"items {config.items}, max_tokens {config.max_tokens}: must be 1 or more"
        )
    check_file(config.json, "json")
    from herdling.eval.harness import evaluate
    from herdling.infer.lm import load_with

    lm, adapter = load_with(config.adapter, config.path, config.dtype, config.device)
    pictures = [name for name in asked if name in IMAGE_TASKS]
    if lm.processor is None and pictures:
        if config.tasks != "all":
            raise InputError(
                f"task {pictures[0]} shows pictures, and {config.path} is a text-only model"
            )
        asked = [name for name in asked if name not in IMAGE_TASKS]
        print(f"a text-only model: {len(pictures)} tasks with pictures are left out")
    side = None if lm.processor is None else lm.processor.size  # one tile
    tasks = [open_task(name, config.seed, side) for name in asked]  # all, before the first is asked
    opened = dict(zip(asked, tasks, strict=True))
    for name in [name for name, task in opened.items() if getattr(task, "runs_code", False)]:
        try:
            sandbox.check()
        except sandbox.SandboxError as problem:
            if config.tasks != "all":
                raise
            del opened[name]
            print(f"{name} is left out: {problem}")
    results: dict[str, Any] = {}
    print(HEADER)
    for name, task in opened.items():
        score = evaluate(lm, task, config.items, max_tokens=config.max_tokens, adapter=adapter)
        results[name] = score.plain()
        print(
            f"{name:<16} {score.accuracy:>8.3f}  {score.low:>5.3f} .. {score.high:.3f}  "
            f"{score.chance:>6.3f}  {score.items:>5}  {score.seconds:>7.1f}",
            flush=True,
        )
        if score.cut_short:
            print(f"  {score.cut_short} of {score.items} replies ran into --max-tokens")
    if config.json is not None:
        about = {
            "model": config.path,
            "adapter": config.adapter,
            "seed": config.seed,
            "split": "test",
        }
        write_json(config.json, {**about, "tasks": results})


def names(given: str, known: Sequence[str]) -> list[str]:
    """The tasks of `--tasks`, each once; files are opened later. Raises ConfigError for an unknown name."""
    from herdling.tasks.registry import is_file

    if given == "all":
        return list(known)
    found = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in found:
        if name not in known and not is_file(name):
            raise ConfigError(f"task {name!r} is unknown{nearest(name, known)}")
    if not found:
        raise ConfigError(f"tasks is {given!r}; name some of {', '.join(known)}, or all")
    return found
