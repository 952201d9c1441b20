"""From what a person types (a folder or a hub name) to a local model folder."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from herdling.errors import CheckpointError
from herdling.files import recover_folder

# Everything a model folder is made of, and nothing that would have to be unpickled. A hub repository
# of Meta's also keeps its own format below original/.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*",
          "NOTICE*"]  # fmt: skip
UNWANTED = ["*.bin", "*.pth", "*.pt", "*.pkl", "*.pickle", "original/*"]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def on_hub(name: Path | str) -> bool:
    """Whether `resolve` asks the hub for this name: nothing local has it, and the hub could."""
    if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
        return False
    try:
        validate_repo_id(str(name))  # the hub has rules of its own, such as no "--"
    except HFValidationError:
        return False
    return True


def resolve(folder: Path | str) -> Path:
    """The local folder: `folder` itself, or the downloaded copy of a hub repository `owner/name`."""
    path = Path(folder)
    recover_folder(path)
    if path.is_dir():
        if not (path / "config.json").exists() and (path / "model/config.json").is_file():
            adapter = f", its adapter {path}/adapter" if (path / "adapter").is_dir() else ""
            raise CheckpointError(f"{path}: is a run; its model is {path}/model{adapter}")
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds config.json")
    if not on_hub(folder):
        raise CheckpointError(f"{path}: no such folder (and not a hub name, which is owner/name)")
    try:
        found = huggingface_hub.snapshot_download(
            str(folder), allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder}: no such folder here, and the hub did not give it: {reason}"
        ) from problem
    return Path(found)
