"""A short clip as several pictures: frames taken evenly from a GIF, WebP, APNG or list of images.

    parts = content("clip.gif", max_frames=8, max_side=processor.size)
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What moves?"}]}]

Llama 4 has no video input of its own: frames go in as separate images, in order. `max_side` equal
to the tile size keeps each frame to one tile. Left out: MP4 and the like, whose decoders are large
dependencies; extract the frames with a video tool and pass the list.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from herdling.errors import InputError
from herdling.inputs.image_files import (
    MAX_MEGAPIXELS,
    Source,
    check_size,
    decoding,
    open_image,
    opened,
    to_rgb,
)

MAX_SOURCE_FRAMES = 5000
MAX_TOTAL_MEGAPIXELS = 2048.0


def frames(
    source: Source | Sequence[Source],
    max_frames: int = 8,
    max_side: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> list[Image.Image]:
    """At most `max_frames` RGB frames in order, first and last among them, evenly spaced by count.

    A sequence is one frame an element (an animated element gives its first frame). `max_side`
    shrinks frames to that many pixels, aspect kept. Raises InputError for what `open_image`
    refuses and, before decoding, for clips of more than 5,000 frames or 2,048 megapixels in all.
    """
    if max_frames < 1:
        raise InputError(f"max_frames is {max_frames}; it must be at least 1")
    if max_side is not None and max_side < 1:
        raise InputError(f"max_side is {max_side}; it must be at least 1")
    if isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray):
        if not source:
            raise InputError("video has no frames; the list of images is empty")
        chosen = [source[i] for i in sampled(len(source), max_frames)]
        return [_shrink(open_image(frame, max_megapixels), max_side) for frame in chosen]
    return [_shrink(frame, max_side) for frame in _animated(source, max_frames, max_megapixels)]


def content(source: Source | Sequence[Source], **options: Any) -> list[dict[str, Any]]:
    """The frames as message content parts; `options` are those of `frames`."""
    return [{"type": "image", "image": frame} for frame in frames(source, **options)]


def sampled(count: int, most: int) -> list[int]:
    """At most `most` indices of 0..count-1, evenly spaced, both ends included (one: the middle)."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [(2 * i * (count - 1) + most - 1) // (2 * (most - 1)) for i in range(most)]


def _animated(source: Source, most: int, max_megapixels: float) -> Iterator[Image.Image]:
    with opened(source, max_megapixels) as (image, name):
        with decoding(name):
            count = getattr(image, "n_frames", 1)
        width, height = image.size
        total = width * height * count / 1e6
        if count > MAX_SOURCE_FRAMES or total > MAX_TOTAL_MEGAPIXELS:
            raise InputError(
                f"{name} has {count} frames, {total:.0f} megapixels; the limits are "
                f"{MAX_SOURCE_FRAMES} frames and {MAX_TOTAL_MEGAPIXELS:g} megapixels in all"
            )
        place = image.tell()
        try:
            for index in sampled(count, most):
                with decoding(f"{name}, frame {index},"):
                    image.seek(index)
                    check_size(image, name, max_megapixels)
                    frame = to_rgb(image)
                yield frame
        finally:
            image.seek(place)


def _shrink(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is not None and max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.BILINEAR, reducing_gap=None)
    return image
