"""From a picture to the tiles and token ids that a Llama 4 model reads.

    processor = ImageProcessor.open(folder)
    tiles = tile(open_image("photo.jpg"), processor)         # (T, 3, S, S) float32
    ids = image_ids(tiles, tokenizer, processor.tokens_per_tile)

The rules are transformers' `image_processing_llama4.py` (and Meta's `llama4/preprocess.py`): choose
a canvas of whole tiles, fit the picture into it without distortion, pad with black at the right and
at the bottom, cut into tiles row by row, append one tile of the whole picture squeezed square.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from herdling.inputs.image_files import Source, open_image
from herdling.inputs.image_processor import ImageProcessor

__all__ = ["ImageProcessor", "Source", "Tiles", "image_ids", "open_image", "tile"]


class SpecialIds(Protocol):
    """What `image_ids` asks of a tokenizer."""

    def special(self, name: str) -> int: ...


@dataclass(frozen=True)
class Tiles:
    """One picture, cut."""

    pixel_values: torch.Tensor
    """(T, 3, S, S) float32: the grid row by row, then the global tile when there is a grid."""
    rows: int
    columns: int


def tile(image: Image.Image, processor: ImageProcessor) -> Tiles:
    """Cut a PIL image of any mode into normalised tiles; T is 1, or rows * columns + 1.

    Raises InputError for a picture beyond `processor.max_megapixels` or of unusable mode.
    """
    image = open_image(image, processor.max_megapixels)
    rows, columns = best_canvas(image.size, processor)
    side = processor.size
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(_resize(image, fitted_size(image.size, rows, columns, processor)), (0, 0))
    cells = np.asarray(canvas).reshape(rows, side, columns, side, 3)
    cells = cells.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, side, side)
    if rows * columns > 1:
        squeezed = np.asarray(_resize(image, (side, side))).transpose(2, 0, 1)
        cells = np.concatenate([cells, squeezed[None]])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.mean, processor.std))
    pixels = torch.from_numpy(np.ascontiguousarray(cells)).float()  # (T, 3, S, S)
    return Tiles(pixels.div_(255).sub_(mean).div_(std), rows, columns)


def best_canvas(size: tuple[int, int], processor: ImageProcessor) -> tuple[int, int]:
    """Rows and columns of the grid for a picture of `size` (width, height) in pixels.

    Of the grids that hold the picture unshrunk, the one that would enlarge it least; if none does,
    the one that shrinks it least; among equals the one with the fewest tiles.
    """
    width, height = size
    grids = {
        (rows, columns): min(columns * processor.size / width, rows * processor.size / height)
        for rows, columns in _grids(processor.max_tiles)
    }
    large = [scale for scale in grids.values() if scale >= 1]
    least = max if processor.resize_to_max_canvas else min
    scale = least(large) if large else max(grids.values())
    return min((g for g in grids if grids[g] == scale), key=lambda grid: grid[0] * grid[1])


def _grids(most: int) -> Iterator[tuple[int, int]]:
    for rows in range(1, most + 1):
        for columns in range(1, most // rows + 1):
            yield rows, columns


def fitted_size(
    size: tuple[int, int], rows: int, columns: int, processor: ImageProcessor
) -> tuple[int, int]:
    """Width and height that a picture of `size` gets within its canvas, aspect kept, floored.

    No side grows beyond the larger of itself and one tile, unless `resize_to_max_canvas`.
    """
    scales = []
    targets = []
    for length, tiles in zip(size, (columns, rows), strict=True):
        canvas = tiles * processor.size
        wanted = canvas if processor.resize_to_max_canvas else max(length, processor.size)
        # transformers divides in float32 where the canvas is the limit and in float64 elsewhere,
        # then floors: 1600x1200 becomes 1344x1007, where exact arithmetic gives 1008.
        # One row less black moves every pixel beside it, so the same rounding is kept here.
        real = np.float32 if canvas < wanted or processor.resize_to_max_canvas else np.float64
        targets.append(min(wanted, canvas))
        scales.append(real(targets[-1]) / real(length))
    across, down = scales
    single = np.float32 if np.float32 in (type(across), type(down)) else np.float64
    if single(across) < single(down):
        return targets[0], max(1, min(_scaled(size[1], across), targets[1]))
    return max(1, min(_scaled(size[0], down), targets[0])), targets[1]


def _scaled(length: int, scale: np.floating) -> int:
    return math.floor(type(scale)(length) * scale)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bilinear; Pillow widens the filter when shrinking, which is the antialiasing meant."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def image_ids(tiles: Tiles, tok: SpecialIds, tokens_per_tile: int) -> list[int]:
    """The token ids that stand for one picture; `tokens_per_tile` patches for each of its tiles.

    `<|image|>` marks the global tile (or the only one); source: Meta `llama4/chat_format.py`.
    """
    patches = [tok.special("<|patch|>")] * tokens_per_tile
    ids = [tok.special("<|image_start|>")]
    if tiles.rows * tiles.columns > 1:
        row = patches + [tok.special("<|tile_x_separator|>"), *patches] * (tiles.columns - 1)
        ids += [*row, tok.special("<|tile_y_separator|>")] * tiles.rows
    return [*ids, tok.special("<|image|>"), *patches, tok.special("<|image_end|>")]
