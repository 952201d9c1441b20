"""How pictures become tiles: the settings, and the two files of a model folder that hold them.

The file names and fields are transformers' own, so that its AutoProcessor reads what is saved here
and this reads any Llama 4 folder. Not carried: `do_resize` and its like, which Llama 4 always does.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from herdling.errors import CheckpointError, ConfigError
from herdling.files import read_json, write_json
from herdling.inputs.image_files import MAX_MEGAPIXELS


class TileShape(Protocol):
    """The three numbers of a vision config that a processor needs."""

    @property
    def image_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def pixel_shuffle_ratio(self) -> float: ...


@dataclass(frozen=True)
class ImageProcessor:
    """How pictures become tiles. Defaults are Scout's and Maverick's."""

    size: int = 336
    """Side of a tile in pixels."""
    patch_size: int = 14
    pixel_shuffle_ratio: float = 0.5
    max_tiles: int = 16
    """Most tiles of a picture, the global one not counted."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize_to_max_canvas: bool = False
    """True enlarges a picture as far as `max_tiles` allows; False never beyond its own size."""
    max_megapixels: float = MAX_MEGAPIXELS
    """Larger pictures are refused before they are decoded. Not part of the saved files."""

    def __post_init__(self) -> None:
        for name in ("size", "patch_size", "max_tiles"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.size % self.patch_size:
            raise ConfigError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean}, std {self.std}: need three each, std above 0")

    @property
    def tokens_per_tile(self) -> int:
        """Patch tokens of one tile after pixel shuffle (144 for Scout)."""
        return round((self.size // self.patch_size * self.pixel_shuffle_ratio) ** 2)

    @classmethod
    def from_vision_config(cls, vision: TileShape, **settings: Any) -> "ImageProcessor":
        """The processor of a model with this `vision_config`; `settings` are further fields."""
        return cls(vision.image_size, vision.patch_size, vision.pixel_shuffle_ratio, **settings)

    @classmethod
    def open(cls, folder: Path | str) -> "ImageProcessor":
        """Read a model folder's processor files, in the spelling of any transformers version.

        `preprocessor_config.json` (or its 5.23 form, nested in `processor_config.json`) describes
        the pixels, `processor_config.json` the patches; what neither says comes from the
        `vision_config` of `config.json`. Raises CheckpointError when they contradict or are absent.
        """
        folder = Path(folder)
        parts = {name: _read(folder / name) for name in _FILES}
        vision = parts["config.json"].get("vision_config") or {}
        outer = parts["processor_config.json"]
        pixels = parts["preprocessor_config.json"] | (outer.get("image_processor") or {})
        if not (vision or pixels or "patch_size" in outer):
            raise CheckpointError(f"{folder}: no {', '.join(_FILES[:2])} and no vision_config")
        try:
            return _from_hf(vision, outer, pixels)
        except (ConfigError, TypeError, ValueError, KeyError) as problem:
            raise CheckpointError(f"{folder}: image processor: {problem}") from problem

    def save(self, folder: Path | str) -> None:
        """Write the two files that transformers' AutoProcessor reads beside the tokenizer's."""
        write_json(Path(folder) / "preprocessor_config.json", self._pixels())
        write_json(
            Path(folder) / "processor_config.json",
            {
                "processor_class": "Llama4Processor",
                "patch_size": self.patch_size,
                "pixel_shuffle_ratio": self.pixel_shuffle_ratio,
                "image_token": "<|image|>",
                "fake_image_token": "<|image|>",
            },
        )

    def _pixels(self) -> dict[str, Any]:
        return {
            # The name that transformers 4.51 to 5.23 all know.
            "image_processor_type": "Llama4ImageProcessorFast",
            "processor_class": "Llama4Processor",
            "size": {"height": self.size, "width": self.size},
            "max_patches": self.max_tiles,
            "resize_to_max_canvas": self.resize_to_max_canvas,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "rescale_factor": 1 / 255,
            "resample": 2,
        }


_FILES = ("preprocessor_config.json", "processor_config.json", "config.json")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected an object")
    return value


def _from_hf(
    vision: dict[str, Any], outer: dict[str, Any], pixels: dict[str, Any]
) -> ImageProcessor:
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if pixels.get(name) is False:
            raise ConfigError(
                f"{name} is false; Llama 4 pictures are always resized and normalised"
            )
    if pixels.get("resample", 2) != 2:
        raise ConfigError(f"resample is {pixels['resample']}; Llama 4 uses 2 (bilinear)")
    if not math.isclose(pixels.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-4):
        raise ConfigError(f"rescale_factor is {pixels['rescale_factor']}; Llama 4 uses 1/255")
    size = pixels.get("size", vision.get("image_size", 336))
    if isinstance(size, dict):
        if size["height"] != size["width"]:
            raise ConfigError(f"size {size['height']} x {size['width']} is not square")
        size = size["height"]
    found = {
        "size": size,
        "patch_size": outer.get("patch_size", vision.get("patch_size", 14)),
        "pixel_shuffle_ratio": outer.get(
            "pixel_shuffle_ratio", vision.get("pixel_shuffle_ratio", 0.5)
        ),
    }
    for name, theirs in zip(
        found, ("image_size", "patch_size", "pixel_shuffle_ratio"), strict=True
    ):
        if theirs in vision and vision[theirs] != found[name]:
            raise ConfigError(
                f"{name} is {found[name]} but vision_config has {theirs} {vision[theirs]}"
            )
    return ImageProcessor(
        **found,
        max_tiles=pixels.get("max_patches", 16),
        mean=tuple(pixels.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(pixels.get("image_std", (0.5, 0.5, 0.5))),
        resize_to_max_canvas=bool(pixels.get("resize_to_max_canvas", False)),
    )
