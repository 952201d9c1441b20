"""Processor settings: read from every spelling in the wild, written for transformers."""

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama4.processing_llama4 import Llama4Processor

from herdling.errors import CheckpointError, ConfigError
from herdling.inputs.image_processor import ImageProcessor
from herdling.model.config import preset

TOY = ImageProcessor(size=32, patch_size=4, max_tiles=4)
# As transformers 5.23 saves it: one file, pixels nested, no pixel_shuffle_ratio.
NESTED = {
    "fake_image_token": "<|image|>",
    "image_processor": {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Llama4ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": 4,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "resize_to_max_canvas": False,
        "size": {"height": 32, "width": 32},
    },
    "image_token": "<|image|>",
    "patch_size": 4,
    "processor_class": "Llama4Processor",
}


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    odd = ImageProcessor(64, 8, 0.25, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), True)
    for number, processor in enumerate((ImageProcessor(), TOY, odd)):
        processor.save(tmp_path / str(number))
        assert ImageProcessor.open(tmp_path / str(number)) == processor


def test_saved_files_carry_what_transformers_reads(tmp_path: Path) -> None:
    TOY.save(tmp_path)
    outer = json.loads((tmp_path / "processor_config.json").read_text())
    pixels = json.loads((tmp_path / "preprocessor_config.json").read_text())
    # The image processor itself needs torchvision: compare with what it writes.
    assert pixels | {"image_processor_type": "Llama4ImageProcessor"} == NESTED[
        "image_processor"
    ] | {
        "processor_class": "Llama4Processor",
        "rescale_factor": pixels["rescale_factor"],
    }
    assert pixels["rescale_factor"] == pytest.approx(1 / 255, rel=1e-12)
    same = {name: value for name, value in NESTED.items() if name != "image_processor"}
    assert outer == same | {"pixel_shuffle_ratio": 0.5}
    assert {*outer} - {"processor_class"} <= {*signature(Llama4Processor.__init__).parameters}


def test_spellings(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert ImageProcessor.open(write(tmp_path / "a", processor_config=NESTED)) == TOY
    (tmp_path / "b").mkdir()
    bare = {"size": 32, "max_patches": 4}
    vision = {"vision_config": {"image_size": 32, "patch_size": 4, "pixel_shuffle_ratio": 0.5}}
    assert (
        ImageProcessor.open(write(tmp_path / "b", preprocessor_config=bare, config=vision)) == TOY
    )
    (tmp_path / "c").mkdir()
    found = ImageProcessor.open(write(tmp_path / "c", config=vision))
    assert found == ImageProcessor(size=32, patch_size=4)


def test_from_vision_config() -> None:
    vision = preset("tiny").vision
    assert vision is not None
    processor = ImageProcessor.from_vision_config(vision, max_tiles=4)
    assert processor == TOY
    assert processor.tokens_per_tile == vision.tokens_per_tile == 16


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no preprocessor_config.json, processor_config.json and no vision_config"),
        ({"preprocessor_config": []}, "preprocessor_config.json: holds list, expected an object"),
        (
            {"preprocessor_config": {"size": {"height": 32, "width": 16}}},
            "size 32 x 16 is not square",
        ),
        ({"preprocessor_config": {"size": {"longest_edge": 9}}}, "image processor: .*height"),
        ({"preprocessor_config": {"size": 30}}, "size 30 is not a multiple of patch_size 14"),
        ({"preprocessor_config": {"do_rescale": False}}, "do_rescale is false"),
        ({"preprocessor_config": {"resample": 3}}, "resample is 3; Llama 4 uses 2"),
        ({"preprocessor_config": {"rescale_factor": 1.0}}, "rescale_factor is 1.0"),
        ({"preprocessor_config": {"max_patches": 0}}, "max_tiles is 0; it must be at least 1"),
        ({"preprocessor_config": {"image_std": [0, 1, 1]}}, "std above 0"),
        (
            {
                "processor_config": {"patch_size": 14},
                "config": {"vision_config": {"patch_size": 28}},
            },
            "patch_size is 14 but vision_config has patch_size 28",
        ),
    ],
)
def test_contradictions_are_errors(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        ImageProcessor.open(write(tmp_path, **files))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="size is 0; it must be at least 1"):
        ImageProcessor(size=0)
