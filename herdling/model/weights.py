"""Names and shapes of a model's tensors, and the two ways a folder may hold routed experts.

The native names are transformers' and come from the model itself, so there is no second list to
keep. Folders made for offline quantization hold one linear per expert instead of the fused tensors;
`slots` says where each such piece lies. Meta's own names are in `meta_format.py`.

Shape letters: E experts, D model width, F expert width.
"""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from herdling.model.config import ModelConfig
from herdling.model.llama import build

# Per-expert name -> fused tensor and which half of its last axis (None: all of it).
PER_EXPERT: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
}


@dataclass(frozen=True)
class Slot:
    """Where one stored tensor lies in a parameter: all of it, or one expert's part."""

    parameter: str
    shape: tuple[int, ...]
    """Of the stored tensor."""
    expert: int | None = None
    half: int | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """The part of `parameter` this slot stands for, in the stored layout (a view).

        Copy into it to load, make it contiguous to save. An expert's linear is [out, in], the
        fused tensors are [E, in, out].
        """
        if self.expert is None:
            return parameter
        part = parameter[self.expert]  # (in, out)
        if self.half is not None:
            width = self.shape[0]
            part = part[:, self.half * width : (self.half + 1) * width]
        return part.T


@lru_cache(maxsize=8)
def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the model's order."""
    model = build(config, device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def fused(config: ModelConfig) -> dict[str, Slot]:
    """Stored name -> slot of the native layout: each parameter under its own name."""
    return {name: Slot(name, shape) for name, shape in shapes(config).items()}


def per_expert(config: ModelConfig) -> dict[str, Slot]:
    """Stored name -> slot of the layout with one linear per expert; only the experts' tensors."""
    F, D = config.text.intermediate_size, config.text.hidden_size
    prefix = "language_model." if config.vision else ""
    found = {}
    for layer in config.text.moe_layers or ():
        experts = f"{prefix}model.layers.{layer}.feed_forward.experts."
        for expert in range(config.text.num_local_experts):
            for name, (target, half) in PER_EXPERT.items():
                shape = (D, F) if name == "down_proj" else (F, D)
                found[f"{experts}{expert}.{name}.weight"] = Slot(
                    experts + target, shape, expert, half
                )
    return found


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor name a folder of this config may use, native or per-expert."""
    return fused(config) | per_expert(config)
