"""Frames of clips: which are taken, in what form they may come, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from herdling.errors import InputError
from herdling.inputs import video
from herdling.inputs.images import ImageProcessor, tile


def grey(level: int, side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), (level, level, level))


def clip(count: int, kind: str = "GIF") -> bytes:
    buffer = io.BytesIO()
    first, *rest = [grey(10 * i) for i in range(count)]
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(buffer, kind, save_all=True, append_images=rest, duration=40, **options)
    return buffer.getvalue()


def levels(images: list[Image.Image]) -> list[int]:
    return [int(np.asarray(image)[0, 0, 0]) for image in images]


@pytest.mark.parametrize(
    ("count", "most", "want"),
    [
        (1, 8, [0]),
        (3, 8, [0, 1, 2]),
        (20, 4, [0, 6, 13, 19]),
        (100, 2, [0, 99]),
        (9, 1, [4]),
        (5, 3, [0, 2, 4]),
    ],
)
def test_sampled(count: int, most: int, want: list[int]) -> None:
    assert video.sampled(count, most) == want


def test_sampled_is_even_and_holds_both_ends() -> None:
    for count in range(2, 60):
        for most in range(2, count + 1):
            chosen = video.sampled(count, most)
            steps = np.diff(chosen)
            assert (len(chosen), chosen[0], chosen[-1]) == (most, 0, count - 1)
            assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_of_an_animation(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(clip(20, kind))
    for source in (path, str(path), path.read_bytes()):
        assert levels(video.frames(source, max_frames=4)) == [0, 60, 130, 190]


def test_an_open_image_keeps_its_place() -> None:
    with Image.open(io.BytesIO(clip(6))) as image:
        image.seek(2)
        assert levels(video.frames(image, max_frames=3)) == [0, 30, 50]
        assert image.tell() == 2


def test_lists_and_stills() -> None:
    assert levels(video.frames([grey(i) for i in range(9)], max_frames=3)) == [0, 4, 8]
    assert levels(video.frames(grey(7))) == [7]


def test_max_side_makes_one_tile_a_frame() -> None:
    processor = ImageProcessor(size=8, patch_size=4)
    wide = [Image.new("RGB", (40, 10)), Image.new("RGB", (3, 3))]
    small = video.frames(wide, max_side=processor.size)
    assert [image.size for image in small] == [(8, 2), (3, 3)]
    assert all(len(tile(image, processor).pixel_values) == 1 for image in small)


def test_content_parts() -> None:
    parts = video.content([grey(1), grey(2)])
    assert [part["type"] for part in parts] == ["image", "image"]
    assert levels([part["image"] for part in parts]) == [1, 2]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the list of images is empty"):
        video.frames([])
    with pytest.raises(InputError, match="max_frames is 0"):
        video.frames(grey(0), max_frames=0)
    with pytest.raises(InputError, match="max_side is 0"):
        video.frames(grey(0), max_side=0)
    with pytest.raises(InputError, match="is a URL"):
        video.frames("https://example.org/a.gif")
    with pytest.raises(InputError, match="is not a picture"):
        video.frames(b"\0\0\0\x18ftypmp42" + b"\0" * 99)
    with pytest.raises(InputError, match="image cannot be decoded"):
        video.frames(clip(10, "WEBP")[:-60], max_frames=2)
    monkeypatch.setattr(video, "MAX_SOURCE_FRAMES", 4)
    with pytest.raises(InputError, match="has 5 frames, 0 megapixels; the limits are 4 frames"):
        video.frames(clip(5))
    monkeypatch.setattr(video, "MAX_SOURCE_FRAMES", 5)
    monkeypatch.setattr(video, "MAX_TOTAL_MEGAPIXELS", 0.001)
    with pytest.raises(InputError, match=r"and 0\.001 megapixels in all"):
        video.frames(clip(5))
