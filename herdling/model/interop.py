"""Sparse experts inside transformers' own Llama 4 classes, for people whose trainers use those."""

from types import MethodType
from typing import Any

from torch import Tensor, nn

from herdling.errors import ConfigError
from herdling.kernels.grouped_matmul import routed_experts


def accelerate_transformers(model: nn.Module) -> nn.Module:
    """Make every MoE layer of a transformers Llama 4 model compute only the chosen experts, in place.

    Outputs, router logits and gradients stay what they were; weights and state dict are untouched.
    Returns the model. Raises ConfigError when it holds no Llama 4 MoE layer. Works on
    `Llama4ForCausalLM`, `Llama4ForConditionalGeneration` and anything that contains them.
    """
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    layers = [m for m in model.modules() if isinstance(m, Llama4TextMoe)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} holds no Llama4TextMoe layer to accelerate")
    for layer in layers:
        layer.forward = MethodType(_sparse_forward, layer)
    return model


def _sparse_forward(layer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """What `Llama4TextMoe.forward` returns: ((N, D) output, (N, E) router logits)."""
    x = hidden_states.reshape(-1, layer.hidden_dim)
    # Through the module, whose hooks record the router logits: scores (N, E), 0 where not chosen.
    scores, logits = layer.router(x)
    chosen = logits.topk(layer.top_k, dim=-1).indices
    gates = scores.gather(1, chosen)
    experts = layer.experts
    routed = routed_experts(x, chosen, gates, experts.gate_up_proj, experts.down_proj)
    return layer.shared_expert(x) + routed, logits
