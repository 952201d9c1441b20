"""Examples from users' records: documents with images, and conversations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from herdling.data.records import Records, located, resolved
from herdling.data.sources import Example, document, shuffled
from herdling.data.split import check_place
from herdling.errors import DataError, Error
from herdling.inputs import chat, images
from herdling.inputs.tokenizer import Tokenizer


class RecordTexts:
    """The `Texts` of records that are nothing but text."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records.sizes)

    def characters(self, i: int) -> int:
        return self._records.sizes[i]

    def text(self, i: int) -> str:
        return self._records.read(i)[2]["text"]


class RecordSource:
    """Records of any kind, in an order that is new each time round; tokenised when their turn comes.

    Loss is on the text of documents and on what the assistant says in conversations. `processor`
    is needed for images. Raises DataError naming file and line for what cannot be rendered.
    """

    def __init__(
        self,
        name: str,
        records: Records,
        tok: Tokenizer,
        *,
        seed: int = 0,
        processor: images.ImageProcessor | None = None,
    ) -> None:
        if len(records.sizes) == 0:
            raise DataError(f"{name}: no record; remedy: name other files, or set split to all")
        self.name = name
        self.size: int | None = len(records.sizes)
        self._records, self._tok, self._processor = records, tok, processor
        self._key = f"{name}/{seed}"

    def example(self, index: int) -> Example:
        check_place("train", index)
        i = shuffled(index, len(self._records.sizes), self._key)
        where, folder, record = self._records.read(i)
        try:
            if "chosen" in record:
                raise DataError("is a preference pair; remedy: `herdling dpo` learns from those")
            if "messages" in record:
                return self._conversation(record, folder)
            return self._document(record, folder)
        except Error as problem:
            raise DataError(f"{where}: {problem}") from problem

    def _conversation(self, record: Mapping[str, Any], folder: Path) -> Example:
        messages = [resolved(message, folder) for message in record["messages"]]
        rendered = chat.render(
            messages,
            self._tok,
            tools=record.get("tools"),
            add_generation_prompt=False,
            processor=self._processor,
        )
        return Example(rendered.ids, rendered.loss_mask, joined(rendered.tiles), self.name)

    def _document(self, record: Mapping[str, Any], folder: Path) -> Example:
        pictures = [images.open_image(located(path, folder)) for path in record.get("images") or []]
        ids = self._tok.encode(record["text"])
        return illustrated(pictures, ids, self._tok, self._processor, self.name)


def illustrated(
    pictures: Sequence[Image.Image],
    ids: Sequence[int],
    tok: Tokenizer,
    processor: images.ImageProcessor | None,
    name: str,
) -> Example:
    """A document of pictures and then text; raises DataError for pictures without a processor."""
    if not pictures:
        return document(ids, tok, name)
    if processor is None:
        raise DataError("has images, but the model has no vision; remedy: train one that has")
    tiles = [images.tile(picture, processor) for picture in pictures]
    each = processor.tokens_per_tile
    image_ids = [i for t in tiles for i in images.image_ids(t, tok, each)]
    return document(ids, tok, name, image_ids, joined(tiles))


def joined(tiles: Sequence[images.Tiles]) -> torch.Tensor | None:
    """The tiles of several pictures as one (T, 3, S, S) tensor; None for none."""
    return torch.cat([t.pixel_values for t in tiles]) if tiles else None
