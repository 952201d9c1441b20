"""From whatever a user gives as a picture to a plain RGB image, within bounds.

Accepted: a path, bytes, a base64 data URI, a PIL image. The header is read first, and a picture
larger than the limit is refused before any of its pixels is decoded. Transparent pictures are laid
on white, EXIF rotation is applied, 16-bit grey keeps its range, an animation gives its first frame.
Left out on purpose: fetching URLs, and formats whose decoders start other programs (EPS, PDF).
"""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from herdling.errors import InputError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_MEGAPIXELS = 64.0
Source = str | Path | bytes | bytearray | Image.Image


def open_image(source: Source, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """The picture as an RGB image, upright, on white where it was transparent.

    Raises InputError for a URL, a missing, damaged or unknown file, and for more pixels than
    `max_megapixels` million. Decoding takes 8 bytes of memory a pixel at the peak, 16 with
    transparency, and 4 more when it must rotate.
    """
    with opened(source, max_megapixels) as (image, name), decoding(name):
        return to_rgb(image)


@contextmanager
def opened(source: Source, max_megapixels: float) -> Iterator[tuple[Image.Image, str]]:
    """Yield the image, header read and size checked but not decoded, and its name for messages.

    A file opened here is closed at the end; a PIL image that was handed in is left open.
    """
    if isinstance(source, Image.Image):
        check_size(source, "image", max_megapixels)
        yield source, "image"
        return
    handle, name = _locate(source)
    with decoding(name):
        image = Image.open(handle, formats=FORMATS)
    with image:
        check_size(image, name, max_megapixels)
        yield image, name


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a damaged file into an InputError that names it."""
    try:
        with warnings.catch_warnings():
            # Only a hint at sizes that check_size is about to judge.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture in {', '.join(FORMATS)}") from None
    except Exception as problem:  # on damaged files Pillow's decoders raise almost anything
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise InputError(f"{name} cannot be decoded: {reason}") from problem


def check_size(image: Image.Image, name: str, max_megapixels: float) -> None:
    """Raise InputError when the header states no pixel at all or too many."""
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width}x{height} pixels; it is empty")
    if width * height > max_megapixels * 1e6:
        raise InputError(
            f"{name} is {width}x{height} pixels, {width * height / 1e6:.1f} megapixels; "
            f"the limit is {max_megapixels:g} (max_megapixels)"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as a new RGB one: upright, on white, the current frame of an animation."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _grey16(image).convert("RGB")
    if image.mode == "F":
        raise InputError("image has mode F, whose range is unknown; convert it to 8 bits first")
    if image.mode == "La":  # premultiplied grey, which Pillow converts to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        colour = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colour).convert("RGB")
    return image.convert("RGB")


def _grey16(image: Image.Image) -> Image.Image:
    """Modes I;16 and I as 8-bit grey; Pillow's own conversion would clip everything above 255."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(
            f"image has mode {image.mode} and values {low} to {high}; only 16 bits (0 to 65535) "
            "have a known range, convert it to 8 bits first"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _locate(source: object) -> tuple[io.BytesIO | Path, str]:
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source), "image"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return io.BytesIO(_data_uri(source)), "data URI"
    # A Path that was made of a URL has one slash left of two.
    if isinstance(source, str | Path) and re.match(r".{,15}://|https?:/", str(source)):
        raise InputError(
            f"image {str(source)[:60]!r} is a URL, which is never fetched; "
            "download it and pass the path or the bytes"
        )
    if isinstance(source, str | Path):
        path = Path(source)
        try:
            regular = path.is_file()
        except (OSError, ValueError):  # a name too long, or with a null byte
            regular = False
        if not regular:
            raise InputError(f"image {str(source)[:200]!r} is not a file")
        return path, str(path)
    raise InputError(
        f"image is {type(source).__name__}; pass a path, bytes, a data URI or a PIL image"
    )


def _data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError(f"image {uri[:40]!r} is no base64 data URI: data:image/png;base64,...")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise InputError(f"data URI is not valid base64: {problem}") from problem
