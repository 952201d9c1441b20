"""The vision encoder: tiles to features in the decoder's width.

Per tile (tiles never see each other): patches, class token at the end, learned positions, a
pre-norm transformer with 2-D RoPE, pixel shuffle, adapter; then the projector. Sources: Meta
`llama4/vision/encoder.py`, `embedding.py`; transformers `modeling_llama4.py`.

Shape letters: N tiles, P patches of a tile (g * g), C vision width, H heads, d head width.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdling.kernels.attention import attend
from herdling.kernels.rope import rotate
from herdling.model.config import VisionConfig


@lru_cache(maxsize=16)
def rope_tables(config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (1, P + 1, d / 2): column angles in the first half of the pairs, then row angles.

    Coordinates count from 1; the class token, last, is not rotated.
    """
    with torch.inference_mode(False):
        d, g = config.head_dim, config.grid
        k = torch.arange(0, d // 2, 2, device=device, dtype=torch.float32)[: d // 4]
        frequency = 1.0 / config.rope_theta ** (k / (d // 2))  # (d / 4,)
        cell = torch.arange(g * g, device=device)
        column, row = cell % g + 1, cell // g + 1
        angles = torch.cat([c[:, None].float() * frequency for c in (column, row)], -1)
        angles = torch.cat([angles, angles.new_zeros(1, d // 2)])
        return angles.cos()[None], angles.sin()[None]


class PatchEmbedding(nn.Module):
    """Bias-free linear map of flattened patches (channel, then row, then column)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.grid, self.patch = config.grid, config.patch_size
        inputs = config.num_channels * config.patch_size**2
        self.linear = nn.Linear(inputs, config.hidden_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        g, p = self.grid, self.patch
        cells = pixels.unflatten(3, (g, p)).unflatten(2, (g, p))  # (N, 3, g, p, g, p)
        return self.linear(cells.permute(0, 2, 4, 1, 3, 5).reshape(pixels.shape[0], g * g, -1))


class VisionAttention(nn.Module):
    """Full attention within a tile, biases on all four projections."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


class AdapterMLP(nn.Module):
    """Two bias-free linears, a GELU after *each*."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = nn.Linear(config.projector_input_dim, config.projector_output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    """Pixel shuffle, then the adapter MLP: (N, P, C) -> (N, P / s^2, output width)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.grid, self.shuffle = config.grid, config.shuffle
        self.mlp = AdapterMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        s = self.shuffle
        cells = x.unflatten(1, (self.grid // s, s, self.grid // s, s))
        return self.mlp(cells.transpose(2, 3).flatten(3).flatten(1, 2))


class VisionModel(nn.Module):
    """pixel_values (N, 3, S, S), normalised to [-1, 1] -> features (N, tokens a tile, output width)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_size
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(config.grid**2 + 1, C))
        self.layernorm_pre = nn.LayerNorm(C)
        self.layernorm_post = nn.LayerNorm(C)
        self.model = VisionEncoder(config)
        self.vision_adapter = VisionAdapter(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values.to(self.class_embedding.dtype))
        x = torch.cat([x, self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
        x = self.layernorm_pre(x + self.positional_embedding_vlm)
        x = self.model(x, *rope_tables(self.config, x.device))
        return self.vision_adapter(self.layernorm_post(x)[:, :-1])


class Projector(nn.Module):
    """From the vision output to the decoder's width, bias-free."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_output_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_1(x)
