"""Tasks by name, each imported only when it is asked for: the built-in ones, and those of users' files.

task = open_task("read_number", seed=0, side=32)
task = open_task("lessons/rhymes.py:Rhymes")          a class of a Python file
task = open_task("lessons/capitals.jsonl")            questions with answers, see herdling.tasks.jsonl
"""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from herdling.config import nearest
from herdling.errors import ConfigError, Error
from herdling.tasks.base import Task

IMAGE_TASKS: dict[str, str] = {
    "read_number": "read_number:ReadNumber",
    "count_shapes": "shapes:CountShapes",
    "locate_shape": "shapes:LocateShape",
    "shape_colour": "shapes:ShapeColour",
    "point_shape": "shapes:PointShape",
    "moving_shape": "shapes:MovingShape",
    "largest_bar": "charts:LargestBar",
    "bar_value": "charts:BarValue",
    "read_word": "documents:ReadWord",
    "read_table": "tables:ReadTable",
}
TEXT_TASKS: dict[str, str] = {
    "arithmetic": "arithmetic:Arithmetic",
    "arithmetic_steps": "steps:Steps",
    "cldr_names": "cldr_names:CldrNames",
    "languages": "languages:Languages",
    "sorting": "sorting:Sorting",
    "strings": "strings:Strings",
    "dates": "dates:Dates",
    "units": "units:Units",
    "translation": "translation:Translation",
    "functions": "functions:Functions",
    "retrieval": "retrieval:Retrieval",
    "instructions": "instructions:Instructions",
}
TOOL_TASKS: dict[str, str] = {
    "calculator": "calculator:Calculator",
    "search": "search:Search",
}
"""Tasks of several turns: the model calls a tool, reads its result, and answers."""
PREFERENCE_TASKS: dict[str, str] = {
    "refusals": "refusals:Refusals",
    "tone": "tone:Tone",
    "form": "form:Form",
}
"""Tasks about manners: each also knows how an answer is worse, for preference pairs."""
TASKS: dict[str, str] = IMAGE_TASKS | TEXT_TASKS | TOOL_TASKS | PREFERENCE_TASKS
"""Name of the task -> 'module:Class' below `herdling.tasks`."""


def create(name: str, **settings: Any) -> Task:
    """The built-in task of that name; `settings` go to its class. Raises ConfigError for another name."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; there are {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    return getattr(importlib.import_module(f"herdling.tasks.{module}"), kind)(**settings)


def open_task(name: str, seed: int = 0, side: int | None = None) -> Task:
    """A built-in task, `FILE.py:Class`, or `FILE.jsonl`.

    `side` is the size of a tile for tasks that draw pictures, None for a model that sees none. A class of
    a user's file gets `seed` and `side` if it takes them. Raises ConfigError for a name that is none of
    these, and for a task with pictures if there is no `side`; DataError for a broken file.
    """
    if name in TASKS:
        if name not in IMAGE_TASKS:
            return create(name, seed=seed)
        if side is None:
            raise ConfigError(f"task {name}: the model has no vision; remedy: one that has")
        return create(name, seed=seed, side=side)
    if not is_file(name):
        raise ConfigError(f"task {name!r} is unknown{nearest(name, list(TASKS))}")
    path, _, kind = name.rpartition(":") if ".py:" in name else (name, "", "")
    if not Path(path).is_file():
        raise ConfigError(f"task {name!r}: {path} is not a file")
    if path.endswith(".py") and not kind:
        raise ConfigError(f"{path} is a file of tasks; name one of its classes: {path}:CLASS")
    if not kind:
        from herdling.tasks.jsonl import JsonLines

        return JsonLines(path, seed)
    made = _class(Path(path), kind)
    try:
        takes = inspect.signature(made).parameters
        if "side" in takes and side is None and takes["side"].default is inspect.Parameter.empty:
            raise ConfigError(f"task {name}: the model has no vision; remedy: one that has")
        given = {"seed": seed, **({} if side is None else {"side": side})}
        task = made(**{key: value for key, value in given.items() if key in takes})
    except Error:
        raise
    except Exception as problem:
        raise ConfigError(
            f"{name} cannot be made: {type(problem).__name__}: {problem}"
        ) from problem
    lacks = [part for part in ("name", "chance") if not hasattr(task, part)]
    lacks += [part for part in ("item", "grade") if not callable(getattr(task, part, None))]
    if lacks:
        raise ConfigError(f"{name} is no task, it has no {' and no '.join(lacks)}")
    return task


def is_file(name: str) -> bool:
    """Whether a name is meant as a user's task, `FILE.py:Class` or `FILE.jsonl`."""
    return ".py:" in name or name.endswith((".py", ".jsonl"))


def _class(path: Path, kind: str) -> Any:
    """The class `kind` of a Python file, which is run as any module is."""
    module_name = f"herdling_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:  # a script may end the program
        raise ConfigError(
            f"{path} cannot be imported: {type(problem).__name__}: {problem}"
        ) from problem
    found = getattr(module, kind, None)
    if not callable(found):
        raise ConfigError(f"{path} has no class {kind!r}")
    return found
