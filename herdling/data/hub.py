"""Records of a dataset by its name or folder, through the `datasets` library.

    hf/tatsu-lab/alpaca           its split `train`
    hf/openai/gsm8k/main          with a configuration
    saved/chats                   a folder that `save_to_disk` wrote; of several splits its `train`

Rows stay in the library's own files on disk. Its other splits are not touched; ours divide its `train`
by content as they do any file. Columns must be those of a record, see `herdling.data.records`.
"""

from array import array
from collections.abc import Mapping
from pathlib import Path

from herdling.data.records import FIELDS, Found, belongs, checked, plain, size
from herdling.data.text_files import keeper
from herdling.errors import ConfigError, DataError, require

PREFIX = "hf/"
_SAVED = ("state.json", "dataset_dict.json")


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of the `datasets` library writes."""
    return any((folder / name).is_file() for name in _SAVED)


class HubRows:
    """The rows of one split, each checked when the dataset is opened."""

    def __init__(self, name: str, split: str = "all") -> None:
        """Raises ConfigError for a name of another form, DataError for rows that are no records."""
        saved = not name.startswith(PREFIX)
        owner, _, rest = name.removeprefix(PREFIX).partition("/")
        dataset, _, configuration = rest.partition("/")
        if not saved and not (owner and dataset):
            raise ConfigError(
                f"data {name!r}: name it hf/OWNER/DATASET or hf/OWNER/DATASET/CONFIGURATION"
            )
        library = require("datasets", "data")
        try:
            if saved:
                rows = library.load_from_disk(name)
                rows = rows["train"] if isinstance(rows, Mapping) else rows
            else:
                rows = library.load_dataset(
                    f"{owner}/{dataset}", configuration or None, split="train"
                )
        except Exception as problem:  # its errors have no common class
            reason = " ".join(str(problem).split())[:300]
            raise DataError(f"{name}: cannot be loaded: {reason}") from None
        self._folder = Path(name) if saved else Path()
        unused = [column for column in rows.column_names if column not in FIELDS]
        rows = rows.remove_columns(unused)
        for column, feature in rows.features.items():
            if type(feature).__name__ == "Image":
                rows = rows.cast_column(column, library.Image(decode=False))
        self._name, self._rows, keep = name, rows, keeper(split)
        self._places, self.sizes = array("q"), array("q")
        for i in range(len(rows)):
            record = self.read(i, place=i)[2]
            if belongs(record, split, keep):
                self._places.append(i)
                self.sizes.append(size(record))

    def read(self, i: int, place: int | None = None) -> Found:
        place = self._places[i] if place is None else place
        where = f"{self._name}: row {place}"
        return where, self._folder, checked(plain(self._rows[place]), where, self._folder)
