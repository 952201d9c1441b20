"""A model folder to a model, at no more memory than the model and one shard."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from herdling.checkpoint.card import Card
from herdling.checkpoint.folder import Folder
from herdling.errors import ConfigError
from herdling.model.config import ModelConfig
from herdling.model.llama import LanguageModel, build
from herdling.model.sites import Site, sites
from herdling.quant.formats import Format
from herdling.quant.modules import Matrix
from herdling.quant.schemes import Scheme
from herdling.quant.swap import chosen, matrix_of, place

log = logging.getLogger(__name__)


def open_model(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    scheme: Scheme | None = None,
    targets: Sequence[str] = (),
) -> tuple[LanguageModel, ModelConfig]:
    """The model and config of a folder or hub name.

    The model is built without memory, then each tensor is copied from its shard straight into the
    final type on the final device. `dtype` None keeps the folder's own type. With a `scheme` the
    weights that it, or `targets`, names are quantized one after the other as they are read: the plain
    model is never held. A folder of quantized weights gives a model of such (ConfigError together with
    a `scheme`). A missing, unexpected, mis-shaped, truncated or doubled tensor is a
    CheckpointError; nothing is re-initialised.
    """
    source = Folder.open(folder)
    if duties := Card.open(source.path, source.config).duties():
        log.warning("%s: %s", folder, duties)
    dtype = dtype or source.dtype
    model = build(source.config, dtype, "meta")

    def quantized(site: Site, weight: Tensor, form: Format) -> Matrix:
        return Matrix.of(source.read(site.parameter).to(device), form, dtype)

    if source.plan is not None:
        if scheme is not None:
            raise ConfigError(
                f"{folder} is quantized already; remedy: leave out quantize={scheme.name!r}, or take "
                "the unquantized model"
            )
        source.plan.place(model, dtype, device)
        matrices = {site.parameter: matrix_of(model, site) for site in sites(model)}
        source.fill_matrices({n: m for n, m in matrices.items() if m is not None})
    elif scheme is not None:
        place(model, scheme, chosen(model, scheme, targets), quantized)
    parameters = {
        name: torch.empty(parameter.shape, dtype=dtype, device=device)
        for name, parameter in model.named_parameters()
    }
    source.fill(parameters)
    model.load_state_dict({**dict(model.named_buffers()), **parameters}, strict=True, assign=True)
    return model, source.config
