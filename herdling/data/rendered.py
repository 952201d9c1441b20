"""Pictures made on the fly, with captions, questions and answers: the image half of built-in data.

    picture = render("scene", seed=0, index=17, split="train", side=32)
    picture.images, picture.caption, picture.questions

A pure function of its arguments. The split is decided by what the picture shows, so no test picture
is ever rendered for training, by this function or by the tasks in `herdling.tasks`.
"""

import random
from collections.abc import Callable
from typing import Any

from herdling.data.charts import chart_picture, make_chart
from herdling.data.drawing import Picture, Question
from herdling.data.pages import document_picture, make_document, make_number, number_picture
from herdling.data.scenes import clip_picture, make_clip, make_scene, scene_picture
from herdling.data.split import draw
from herdling.errors import ConfigError

__all__ = ["KINDS", "Picture", "Question", "render"]

_Make = Callable[..., Any]
_Finish = Callable[[Any, random.Random, int], Picture]
_TABLE: dict[str, tuple[_Make, _Finish]] = {
    "number": (make_number, number_picture),
    "scene": (make_scene, scene_picture),
    "chart": (make_chart, chart_picture),
    "document": (make_document, document_picture),
    "clip": (make_clip, clip_picture),
}
KINDS = tuple(_TABLE)


def render(
    kind: str, seed: int, index: int, split: str = "train", side: int = 32, **options: Any
) -> Picture:
    """The picture of `kind` at `index` >= 0, `side` pixels wide and high.

    `options` go to the kind's own maker: `digits` of a number, `fewest` and `most` shapes of a
    scene, `lines` and `longest` word of a document, `frames` of a clip.
    """
    if kind not in _TABLE:
        raise ConfigError(f"kind is {kind!r}; there are {', '.join(KINDS)}")
    if side < 16:
        raise ConfigError(f"side is {side}; nothing is legible below 16 pixels")
    make, finish = _TABLE[kind]
    name = f"rendered {kind}"
    layout = draw(
        name, seed, split, index, lambda rng: make(rng, **options), lambda made: made.content
    )
    return finish(layout, random.Random(f"{name}/{seed}/{split}/{index}/questions"), side)
