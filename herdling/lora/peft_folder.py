"""Adapter folders of peft, both ways: `adapter_config.json` and `adapter_model.safetensors`.

    lora.save(model, "runs/chat/adapter", base="runs/base/model")
    lora.load(model, "adapters/french", "french")

peft's layout of linears is ours: `X.lora_A.weight` (r, in), `X.lora_B.weight` (out, r). Fused experts
are flattened to two matrices, and the two tensors of a layer are two wrappers, one in the other: the
names of the inner one (gate_up_proj) have `.base_layer` in them if there is an outer one (down_proj).
With a stored tensor W (E, i, o) and a change W[e] += scale * A[e] B[e] of ours, A (E, i, r), B (E, r, o):

    peft >= 0.19   lora_A (E * r, o): row e * r + k is B[e, k]     lora_B (i, r * E): column k * E + e is A[e, :, k]
    peft < 0.19    lora_A (E * r, i): row e * r + k is A[e, :, k]  lora_B (o, r * E): column k * E + e is B[e, k]

(0.19 takes 3-D parameters for (E, out, in) unless their module says otherwise, which Llama 4's does
not.) We write the first; we read both, told apart by their shapes, or by `peft_version` where i = o.
Nothing is unpickled, and every tensor of a file must be used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from herdling.errors import CheckpointError
from herdling.files import atomic_folder, read_json, recover_folder, write_json
from herdling.lora.adapters import Adapters, of
from herdling.lora.layers import Factors
from herdling.lora.peft_config import PeftConfig, Target, to_peft
from herdling.model.sites import Site, home_of, shape_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = {"F64", "F32", "F16", "BF16"}
MAGNITUDE = "lora_magnitude_vector"


def save(
    model: nn.Module,
    folder: Path | str,
    name: str | None = None,
    base: str = "",
    files: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter as a folder that peft loads onto transformers' Llama 4; all or nothing.

    Args:
        name: which adapter; may be left out where there is one.
        base: folder or hub name of the model it belongs to.
        files: further text files of the folder by name, such as README.md.

    Raises CheckpointError where `folder` holds something else.
    """
    factors = of(model).factors(name)
    check_target(folder)
    tensors: dict[str, Tensor] = {}
    for site, own in factors.values():
        A, B = (t.detach().cpu() for t in (own.A, own.B))
        if site.fused:
            E, inner, r = A.shape
            A, B = B.reshape(E * r, -1), A.permute(1, 2, 0).reshape(inner, r * E)
        stem = _stem(site, factors)
        tensors[f"{stem}.lora_A.weight"] = A.contiguous()
        tensors[f"{stem}.lora_B.weight"] = B.contiguous()
        if own.magnitude is not None:
            tensors[f"{stem}.{MAGNITUDE}"] = own.magnitude.detach().cpu()
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        write_json(temporary / CONFIG, to_peft(model, factors, base))
        for file, text in (files or {}).items():
            (temporary / file).write_text(text, "utf-8")


def load(model: nn.Module, folder: Path | str, name: str, *, trainable: bool = False) -> Adapters:
    """Put the adapter of a folder on the model, under `name`, in the type of its weights.

    It serves the tokens that ask for it (`Adapters.using`). With `trainable` it goes on being
    trained: the model is frozen and every token uses it. On a model without weights (device meta) the
    factors are on the CPU, to be written elsewhere. Raises CheckpointError for a folder that is not
    whole, not for this model, or that does what is not done here.
    """
    path = Path(folder)
    recover_folder(path)
    file = path / WEIGHTS
    if not file.exists():
        pickled = next(iter(sorted(p.name for p in path.glob("adapter_model.*"))), None)
        hint = f"; {pickled} would have to be unpickled, which is not done" if pickled else ""
        raise CheckpointError(f"{file}: no such file{hint}")
    config = PeftConfig(read_json(path / CONFIG, CheckpointError), str(path / CONFIG))
    targets = config.targets(model)
    stored = _Stored(file)
    factors = {
        site: _factors(model, site, target, targets, config, stored)
        for site, target in targets.items()
    }
    stored.finish(model)
    for own in factors.values():
        own.requires_grad_(trainable)
    adapters = of(model)
    (adapters.train if trainable else adapters.add)(name, factors)
    return adapters


def _stem(site: Site, others: Mapping[str, Any]) -> str:
    """The beginning of a site's names in the file."""
    outer = site.fused == "gate_up_proj" and f"{site.module}.down_proj" in others
    return f"{PREFIX}{site.module}{'.base_layer' if outer else ''}"


def _factors(
    model: nn.Module,
    site: Site,
    target: Target,
    targets: Mapping[Site, Target],
    config: PeftConfig,
    stored: "_Stored",
) -> Factors:
    shape, (device, kind) = shape_of(model, site), home_of(model, site)
    device = torch.device("cpu") if device.type == "meta" else device
    stem = _stem(site, {other.path: None for other in targets})
    r = target.r

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        return stored.take(name, shape, kind)

    if site.fused:
        E, inner, out = shape
        swapped = _swapped(stored.shape(f"{stem}.lora_A.weight"), inner, out, config)
        i, o = (out, inner) if swapped else (inner, out)
        first = read(f"{stem}.lora_A.weight", (E * r, i)).view(E, r, i)
        second = (
            read(f"{stem}.lora_B.weight", (o, r * E)).view(o, r, E).permute(2, 1, 0)
        )  # (E, r, o)
        A, B = (second, first) if swapped else (first, second)
        A = A.transpose(1, 2)  # (E, in, r)
    else:
        out, inner = shape
        A = read(f"{stem}.lora_A.weight", (r, inner))
        B = read(f"{stem}.lora_B.weight", (out, r))
    magnitude = None
    if config.dora:
        if target.by_parameter:
            raise CheckpointError(f"{config.file}: use_dora does not go with {site.parameter}")
        magnitude = read(f"{stem}.{MAGNITUDE}", (out,))
    A, B, magnitude = (None if t is None else t.to(device).contiguous() for t in (A, B, magnitude))
    assert A is not None
    assert B is not None
    return Factors(A, B, target.alpha, config.rslora, magnitude)


def _swapped(shape: list[int], inner: int, out: int, config: PeftConfig) -> bool:
    """Whether lora_A of experts stands for the columns of the stored tensor (peft >= 0.19)."""
    if inner != out:
        return shape[-1:] == [out]
    number = [int(part) for part in config.version.split(".")[:2] if part.isdigit()]
    return len(number) < 2 or number >= [0, 19]


class _Stored:
    """The tensors of a file, each of which is to be used once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._open = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(f"{file}: {problem}") from problem
        self.left = set(self._open.keys())

    def shape(self, name: str) -> list[int]:
        if name not in self.left:
            raise CheckpointError(f"{self.file}: tensor {name} is missing")
        return self._open.get_slice(name).get_shape()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found, kind = self.shape(name), self._open.get_slice(name).get_dtype()
        if tuple(found) != shape:
            raise CheckpointError(
                f"{self.file}: tensor {name} has shape {found}, the model and {CONFIG} need "
                f"{list(shape)}"
            )
        if kind not in FLOATS:
            raise CheckpointError(f"{self.file}: tensor {name} is stored as {kind}, not a float")
        self.left.remove(name)
        tensor = self._open.get_tensor(name).to(dtype)
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.file}: tensor {name} holds inf or NaN in {dtype}")
        return tensor

    def finish(self, model: nn.Module) -> None:
        """Raise CheckpointError for a tensor that nothing used.

        Where the head is adapted peft also saves the head itself: fine if it is the model's own.
        """
        own = dict(model.named_parameters())
        for name in sorted(self.left):
            plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            if plain not in own:
                raise CheckpointError(f"{self.file}: tensor {name} is unexpected")
            value = self._open.get_tensor(name)
            if value.shape != own[plain].shape or not torch.equal(
                value.to(own[plain].dtype), own[plain].detach().cpu()
            ):
                raise CheckpointError(
                    f"{self.file}: {name} is a changed weight of the base model; "
                    "only adapters are supported"
                )


def check_target(folder: Path | str) -> None:
    """Raise CheckpointError unless an adapter may take the place of what is at `folder`."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; remedy: a new or an empty folder")
    names = {entry.name for entry in folder.iterdir()}
    if names and (CONFIG not in names or any((folder / name).is_dir() for name in names)):
        raise CheckpointError(
            f"{folder} is not empty and no adapter folder; remedy: a new or an empty folder"
        )
