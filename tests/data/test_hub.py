"""Datasets by name; the library itself where it is installed, else a stand-in with the same calls."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from herdling.data.hub import HubRows
from herdling.data.spec import Opening, open_files, open_sources
from herdling.errors import ConfigError, DataError, MissingExtra
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer

TOK = Tokenizer.train([], 300)
ROWS = [
    {"instruction": f"say {i}", "input": None, "output": str(i), "rating": 1} for i in range(40)
]


class Rows:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        self.features: dict[str, Any] = {name: "Value" for name in rows[0]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]

    def remove_columns(self, names: list[str]) -> "Rows":
        return Rows([{k: v for k, v in row.items() if k not in names} for row in self.rows])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `load_dataset` was called with; it gives ROWS."""
    calls: list[tuple] = []
    try:
        import datasets
    except ImportError:
        datasets = SimpleNamespace()
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        make: Any = Rows
    else:
        make = datasets.Dataset.from_list

    def load(name: str, configuration: str | None = None, split: str | None = None) -> Any:
        calls.append((name, configuration, split))
        if name == "no/such":
            raise FileNotFoundError("it is\nnot there")
        return make(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load, raising=False)
    return calls


def test_rows_are_records(asked: list[tuple]) -> None:
    rows = HubRows("hf/some/alpaca")
    assert len(rows.sizes) == 40
    where, _, record = rows.read(7)
    assert where == "hf/some/alpaca: row 7"
    assert record["messages"][1] == {"role": "assistant", "content": "7"}
    HubRows("hf/some/alpaca/main")
    assert asked == [("some/alpaca", None, "train"), ("some/alpaca", "main", "train")]


def test_rows_are_split_by_content(asked: list[tuple]) -> None:
    parts = {split: HubRows("hf/some/alpaca", split) for split in ("train", "validation", "test")}
    told = [rows.read(i)[0] for rows in parts.values() for i in range(len(rows.sizes))]
    assert sorted(told) == sorted(f"hf/some/alpaca: row {i}" for i in range(40))
    assert len(parts["train"].sizes) > 20
    ((source, weight),) = open_sources("hf/some/alpaca:2", Opening(TOK))
    assert (source.size, weight) == (len(parts["train"].sizes), 2.0)
    assert source.example(3).tokens[0] == TOK.bos


def test_a_folder_that_the_library_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures stand beside it; of several splits only `train` is read."""
    rows = [{"text": "a cat", "image": "cat.png"}, {"text": "a dog", "image": None}]
    try:
        import datasets
    except ImportError:
        datasets = SimpleNamespace()
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        saved: dict[str, Any] = {str(tmp_path): Rows(rows)}
        saved[str(tmp_path / "splits")] = {"test": Rows(ROWS), "train": Rows(rows)}
        monkeypatch.setattr(datasets, "load_from_disk", saved.__getitem__, raising=False)
        (tmp_path / "splits").mkdir()
        (tmp_path / "state.json").touch()
        (tmp_path / "splits" / "dataset_dict.json").touch()
    else:
        whole = datasets.Dataset.from_list(rows)
        whole.save_to_disk(tmp_path)
        both = datasets.DatasetDict({"test": whole.select([1]), "train": whole})
        both.save_to_disk(tmp_path / "splits")
    for folder in (tmp_path, tmp_path / "splits"):
        Image.new("RGB", (8, 8)).save(folder / "cat.png")
        found = open_files(str(folder), Opening(TOK, "all"))
        assert isinstance(found, HubRows)
        assert [found.read(i)[1:] for i in range(2)] == [
            (folder, {"text": "a cat", "images": ["cat.png"]}),
            (folder, {"text": "a dog"}),
        ]


def test_refusals(asked: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="name it hf/OWNER/DATASET"):
        HubRows("hf/alpaca")
    with pytest.raises(DataError, match="hf/no/such: cannot be loaded: it is not there"):
        HubRows("hf/no/such")
    monkeypatch.setitem(ROWS[3], "output", None)
    with pytest.raises(DataError, match="hf/some/alpaca: row 3: output is missing"):
        HubRows("hf/some/alpaca")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'herdling\[data\]'"):
        HubRows("hf/some/alpaca")


def test_pictures_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs pip install 'herdling[data]'")
    picture = Image.new("RGB", (32, 32), (200, 0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    table = datasets.Dataset.from_list(
        [{"conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}],
          "image": {"bytes": buffer.getvalue(), "path": None}}]
    ).cast_column("image", datasets.Image())  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    processor = ImageProcessor(size=32, patch_size=4)
    ((source, _),) = open_sources("hf/a/b", Opening(TOK, "all", processor=processor))
    example = source.example(0)
    assert example.tiles is not None
    assert example.tiles.shape == (1, 3, 32, 32)
