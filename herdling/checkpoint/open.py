"""A model folder to a model, at no more memory than the model and one shard."""

import logging
from pathlib import Path

import torch

from herdling.checkpoint.card import Card
from herdling.checkpoint.folder import Folder
from herdling.model import weights
from herdling.model.config import ModelConfig
from herdling.model.llama import LanguageModel, build

log = logging.getLogger(__name__)


def open_model(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[LanguageModel, ModelConfig]:
    """The model and config of a folder or hub name.

    The model is built without memory, then each tensor is copied from its shard straight into the
    final type on the final device. `dtype` None keeps the folder's own type. A missing, unexpected,
    mis-shaped, truncated or doubled tensor is a CheckpointError; nothing is re-initialised.
    """
    source = Folder.open(folder)
    if duties := Card.open(source.path, source.config).duties():
        log.warning("%s: %s", folder, duties)
    dtype = dtype or source.dtype
    parameters = {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, shape in weights.shapes(source.config).items()
    }
    source.fill(parameters)
    model = build(source.config, dtype, "meta")
    model.load_state_dict(parameters, strict=True, assign=True)
    return model, source.config
