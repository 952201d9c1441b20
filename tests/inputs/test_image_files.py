"""Every kind of picture people send, and every kind they should not get away with."""

import base64
import io
import struct
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from herdling.errors import InputError
from herdling.inputs.image_files import open_image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(mode: str = "RGB") -> Image.Image:
    x = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (10, 1))
    return Image.fromarray(np.stack([x, 255 - x, x // 2], -1)).convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunks = b""
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
                       (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):  # fmt: skip
        body = kind + data
        chunks += struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_path_bytes_uri_and_image_agree(tmp_path: Path) -> None:
    data = encoded(ramp())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, bytearray(data), uri, "DATA" + uri[4:], ramp()):
        assert open_image(source).tobytes() == ramp().tobytes()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG", "MPO"])
def test_formats(kind: str) -> None:
    image = Image.new("RGB", (30, 20), (0, 128, 255))
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    got = np.asarray(open_image(encoded(image, kind, **options))).astype(int)
    assert got.shape == (20, 30, 3)
    assert np.abs(got - (0, 128, 255)).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_become_rgb(mode: str) -> None:
    image = ramp(mode)
    got = open_image(image)
    assert got.mode == "RGB"
    assert got.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((40, 40, 40, 255), (0, 0, 2, 4))
    image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    got = np.asarray(open_image(image))
    assert (got[:, :2] == 40).all()
    assert (got[:, 2:] == 255).all()


def test_half_transparent_is_blended_and_palette_transparency_counts() -> None:
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert open_image(half).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    got = open_image(encoded(palette, "PNG", transparency=1))
    assert [got.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    keyed = open_image(encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9)))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_keeps_its_range(kind: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]])
    types = {"I;16": "<u2", "I;16B": ">u2", "I": "i4"}
    raw = levels.astype(types[kind]).tobytes()
    image = Image.frombytes(kind, (4, 1), raw)
    assert np.asarray(open_image(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_png_file() -> None:
    image = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    assert np.asarray(open_image(encoded(image)))[0, :, 1].tolist() == [0, 128, 255]


def test_integers_and_floats_without_a_known_range_are_refused() -> None:
    with pytest.raises(InputError, match="mode I and values -1 to 5; only 16 bits"):
        open_image(Image.fromarray(np.array([[-1, 5]], np.int32)))
    with pytest.raises(InputError, match="mode F, whose range is unknown; convert"):
        open_image(Image.fromarray(np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 16, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the camera "did"
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = open_image(encoded(stored, "JPEG", exif=exif, quality=100))
    for image in (got, open_image(got)):
        assert image.size == (32, 16)
        assert image.getpixel((4, 4))[0] > 200  # type: ignore[index]
        assert image.getpixel((28, 12))[0] < 50  # type: ignore[index]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = encoded(red, kind, save_all=True, append_images=[blue], duration=50)
    got = open_image(data).getpixel((8, 8))
    assert np.abs(np.array(got) - (255, 0, 0)).max() <= 4


def test_one_pixel() -> None:
    assert open_image(encoded(Image.new("L", (1, 1), 7))).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    ("width", "height"), [(8001, 8000), (12_000, 12_000), (60_000, 60_000), (10**9, 1)]
)
def test_absurd_sizes_are_refused_unread(width: int, height: int) -> None:
    data = png_header(width, height)
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"megapixels; the limit is 64|exceeds limit"):
            open_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_the_limit_is_a_setting() -> None:
    with pytest.raises(
        InputError, match=r"image is 24x10 pixels, 0.0 megapixels; the limit is 0.0"
    ):
        open_image(ramp(), max_megapixels=0.0002)
    assert open_image(ramp(), max_megapixels=0.00024).size == (24, 10)
    with pytest.raises(InputError, match="cannot be decoded"):  # past this limit, not that of size
        open_image(png_header(9000, 9000), max_megapixels=100)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.05, 0.3, 0.7):
        with pytest.raises(InputError, match=r"^image (cannot be decoded|is not a picture)"):
            open_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "image is not a picture in BMP, GIF"),
        (b"hello, world" * 99, "image is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image is not a picture"),
        ("https://example.org/a.png", "'https://example.org/a.png' is a URL, which is never"),
        (Path("https://example.org/a.png"), "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("s3://bucket/a.png", "is a URL"),
        ("no/such/file.png", "'no/such/file.png' is not a file"),
        ("/dev/zero", "'/dev/zero' is not a file"),
        (".", "'.' is not a file"),
        ("", "'.' is not a file|'' is not a file"),
        ("nul\0byte", "is not a file"),
        ("x" * 100_000, "is not a file"),
        ("data:image/png;base64,@@@", "data URI is not valid base64"),
        ("data:image/png,abc", "is no base64 data URI"),
        ("data:image/png;base64", "is no base64 data URI"),
        ("data:image/png;base64,", "data URI is not a picture"),
        (12, "image is int; pass a path, bytes, a data URI or a PIL image"),
        (None, "image is NoneType"),
        (Image.new("RGB", (0, 5)), "image is 0x5 pixels; it is empty"),
    ],
)
def test_what_is_no_picture(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.binary(max_size=40), st.integers(0, 300), st.sampled_from(["PNG", "GIF", "WEBP", "TIFF"]))
def test_damage_never_gives_another_exception(patch: bytes, place: int, kind: str) -> None:
    data = bytearray(encoded(ramp(), kind))
    place %= len(data)
    data[place : place + len(patch)] = patch
    with suppress(InputError):
        assert open_image(bytes(data), max_megapixels=1).mode == "RGB"
