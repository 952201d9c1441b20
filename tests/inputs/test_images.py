"""Tiling against transformers' Llama 4 image processor, and every kind of awkward picture.

The reference needs torchvision, which these tests do without: its results lie in
`llama4_tiles.npz`, written by `python tests/inputs/test_images.py` (transformers 5.23, torchvision
0.29). Tiles are 8 pixels wide there so that every pixel of 40 pictures fits in a small file; the
sizes of canvas and fitted picture are also stored for several hundred pictures at 336.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llama4.processing_llama4 import Llama4Processor

from herdling.inputs.images import (
    ImageProcessor,
    Tiles,
    best_canvas,
    fitted_size,
    image_ids,
    tile,
)

FIXTURE = Path(__file__).with_name("llama4_tiles.npz")
SMALL = ImageProcessor(size=8, patch_size=4)
# One grey level where the two resizers round differently, plus transformers' bf16 normalisation.
TOLERANCE = 0.012
SHAPES = [(w, h) for w in (1, 5, 8, 9, 16, 23, 40, 64, 101) for h in (1, 7, 8, 17, 32, 75)]
SHAPES += [(300, 2), (2, 300), (160, 120), (64, 48), (1600, 1200)]


class Specials:
    """A tokenizer that knows nothing but the special names, which are their own ids."""

    def special(self, name: str) -> int:
        return NAMES.index(name)


NAMES = ["<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
         "<|image|>", "<|patch|>"]  # fmt: skip


def picture(width: int, height: int) -> Image.Image:
    """A gradient, a fine texture and a checkerboard: smooth, sharp and aliasing all at once."""
    y, x = np.mgrid[:height, :width]
    bands = (x * 255 // max(width - 1, 1), (x * 7 ^ y * 13) & 255, (x // 5 + y // 5) % 2 * 255)
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))


def photo_sizes() -> list[tuple[int, int]]:
    """Common photo and screen formats, exact ratios at many scales, and plain random ones."""
    random = np.random.default_rng(0).integers(1, 4000, (300, 2)).tolist()
    ratios = [(3, 2), (4, 3), (16, 9), (1, 1)]
    scaled = [(a * k, b * k) for a, b in ratios for k in range(40, 1000, 29)]
    common = [(640, 480), (1920, 1080), (5000, 100), (100, 5000), (1600, 1200), (336, 336), (1, 1),
              (337, 336), (50, 20), (1, 4000), (3840, 2160), (4032, 3024)]  # fmt: skip
    return [(int(w), int(h)) for w, h in [*common, *scaled, *random]]


def test_grids_named_in_the_specification() -> None:
    full = ImageProcessor()
    assert best_canvas((640, 480), full) == (2, 2)
    assert best_canvas((1920, 1080), full) == (3, 5)
    assert best_canvas((5000, 100), full) == (1, 15)
    assert best_canvas((336, 336), full) == best_canvas((20, 50), full) == (1, 1)


@pytest.mark.parametrize("enlarge", [False, True])
def test_canvas_and_fitted_size_match_transformers(enlarge: bool) -> None:
    processor = ImageProcessor(resize_to_max_canvas=enlarge)
    want = np.load(FIXTURE)[f"sizes_{enlarge}"]
    got = []
    for size in photo_sizes():
        rows, columns = best_canvas(size, processor)
        got.append((rows, columns, *fitted_size(size, rows, columns, processor)))
    assert np.array_equal(np.array(got), want)


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_every_pixel_matches_transformers(number: int) -> None:
    stored = np.load(FIXTURE)
    tiles = tile(picture(*SHAPES[number]), SMALL)
    assert (tiles.rows, tiles.columns) == tuple(stored[f"grid_{number}"])
    want = torch.from_numpy(stored[f"tiles_{number}"]).float()
    assert tiles.pixel_values.dtype == torch.float32
    assert tiles.pixel_values.shape == want.shape
    assert (tiles.pixel_values - want).abs().max() <= TOLERANCE


def test_grid_is_row_major_and_the_global_tile_is_last() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (255, 255, 0)]
    image = Image.new("RGB", (24, 16))
    for cell, colour in enumerate(colours):
        image.paste(colour, (cell % 3 * 8, cell // 3 * 8, cell % 3 * 8 + 8, cell // 3 * 8 + 8))
    tiles = tile(image, SMALL)
    assert (tiles.rows, tiles.columns) == (2, 3)
    for cell, colour in enumerate(colours):
        flat = torch.tensor(colour).view(3, 1, 1).expand(3, 8, 8) / 127.5 - 1
        assert torch.equal(tiles.pixel_values[cell], flat)
    assert tiles.pixel_values[-1].std() > 0.1  # squeezed, so it shows them all


def test_padding_is_black_at_the_right_and_the_bottom() -> None:
    white = tile(Image.new("RGB", (20, 12), "white"), SMALL).pixel_values  # a 2x3 canvas
    grid = white[:6].view(2, 3, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 16, 24)
    assert (grid[:, :12, :20] == 1).all()
    assert (grid[:, 12:] == -1).all()
    assert (grid[:, :, 20:] == -1).all()
    assert (white[6] == 1).all()


@pytest.mark.parametrize("rows", range(1, 5))
@pytest.mark.parametrize("columns", range(1, 5))
def test_ids_match_the_string_of_transformers_processor(rows: int, columns: int) -> None:
    # The method reads nothing of the processor, which could not be built without torchvision.
    text = Llama4Processor._prompt_split_image(None, (rows, columns), 3)  # type: ignore[arg-type]
    ids = image_ids(Tiles(torch.empty(0), rows, columns), Specials(), 3)
    assert "".join(NAMES[i] for i in ids) == text


def test_token_counts_of_scout() -> None:
    tokens = ImageProcessor().tokens_per_tile
    assert tokens == 144
    assert len(image_ids(Tiles(torch.empty(0), 1, 1), Specials(), tokens)) == 147
    assert len(image_ids(Tiles(torch.empty(0), 2, 2), Specials(), tokens)) == 727


def test_tiling_respects_max_tiles() -> None:
    for most in range(1, 17):
        for size in ((90, 9), (9, 90), (70, 70), (33, 50)):
            rows, columns = best_canvas(size, ImageProcessor(size=8, patch_size=4, max_tiles=most))
            assert rows * columns <= most


def test_tile_takes_any_mode_and_leaves_the_picture_alone() -> None:
    image = picture(20, 12).convert("P")
    before = image.tobytes()
    tiles = tile(image, SMALL)
    assert tiles.pixel_values.shape == (7, 3, 8, 8)
    assert image.mode == "P"
    assert image.tobytes() == before


def _write_fixture() -> None:
    from transformers.image_utils import SizeDict
    from transformers.models.llama4 import image_processing_llama4 as theirs

    stored = {}
    for enlarge in (False, True):
        found = theirs.find_supported_resolutions(16, SizeDict(height=336, width=336))
        rows = []
        for width, height in photo_sizes():
            canvas = theirs.get_best_fit((height, width), torch.tensor(found), enlarge)
            target = tuple(canvas)
            if not enlarge:
                target = (min(max(height, 336), canvas[0]), min(max(width, 336), canvas[1]))
            fitted = theirs.get_max_res_without_distortion((height, width), target)
            rows.append([int(c) // 336 for c in canvas] + [max(int(s), 1) for s in fitted[::-1]])
        stored[f"sizes_{enlarge}"] = np.array(rows, np.int16)
    processor = theirs.Llama4ImageProcessor(size={"height": 8, "width": 8})
    for number, shape in enumerate(SHAPES):
        result = processor(picture(*shape), return_tensors="pt")
        # float16 holds every bf16 value of -1..1 that comes from an 8-bit grey level.
        stored[f"tiles_{number}"] = result["pixel_values"].half().numpy()
        stored[f"grid_{number}"] = result["aspect_ratios"][0].numpy().astype(np.int8)
        assert torch.equal(result["pixel_values"], result["pixel_values"].half().bfloat16())
    np.savez_compressed(FIXTURE, **stored)


if __name__ == "__main__":
    _write_fixture()
