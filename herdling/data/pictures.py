"""Rendered pictures as pretraining documents: the picture, then what it shows.

Half of the documents end with the caption, half with one of the picture's questions and its answer.
"""

import random

from herdling.data.record_source import illustrated
from herdling.data.rendered import KINDS, render
from herdling.data.sources import Example
from herdling.errors import ConfigError
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer


class PictureSource:
    """Endless documents about one kind of rendered picture, drawn at the size of one tile."""

    size: int | None = None

    def __init__(
        self,
        kind: str,
        tok: Tokenizer,
        processor: ImageProcessor,
        *,
        split: str = "train",
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind!r}; there are {', '.join(KINDS)}")
        self.name = f"picture/{kind}"
        self._kind, self._tok, self._processor = kind, tok, processor
        self._split, self._seed = split, seed

    def example(self, index: int) -> Example:
        side = self._processor.size
        picture = render(self._kind, self._seed, index, self._split, side)
        rng = random.Random(f"{self.name}/{self._seed}/{self._split}/{index}")
        text = picture.caption
        if picture.questions and rng.random() < 0.5:
            question = rng.choice(picture.questions)
            text = f"{question.text}\n{question.answer}"
        ids = self._tok.encode(text)
        return illustrated(picture.images, ids, self._tok, self._processor, self.name)
