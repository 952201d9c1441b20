"""The built-in tasks by name, each imported only when it is asked for.

task = create("read_number", seed=0, side=32)
item = task.item(0, "test")
"""

import importlib
from typing import Any

from herdling.errors import ConfigError
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
TASKS: dict[str, str] = IMAGE_TASKS | TEXT_TASKS | TOOL_TASKS
"""Name of the task -> 'module:Class' below `herdling.tasks`."""


def create(name: str, **settings: Any) -> Task:
    """The task of that name; `settings` go to its class. Raises ConfigError for an unknown name."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; there are {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    return getattr(importlib.import_module(f"herdling.tasks.{module}"), kind)(**settings)
