"""A folder's text model run one block at a time, so that no more than a block is ever in memory.

layers = Layers(Folder.open(path), torch.bfloat16)
x = layers.embed(ids)
for i in range(layers.count):
    x = layers.block(i)(x, layers.places(x), None)
layers.logits(x)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.checkpoint.folder import Folder
from herdling.model.llama import Block, Layout, rms_norm
from herdling.model.sites import sites
from herdling.quant.swap import matrix_of


class Layers:
    """Reads what it is asked for and keeps nothing."""

    def __init__(
        self, source: Folder, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.config = source.config.text
        self.root = "language_model." if source.config.vision else ""

    @property
    def count(self) -> int:
        return self.config.num_hidden_layers

    def prefix(self, layer: int) -> str:
        """What stands before a block's parameters in the folder."""
        return f"{self.root}model.layers.{layer}."

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> hidden states (B, T, D)."""
        table = self.source.read(f"{self.root}model.embed_tokens.weight", self.dtype)
        return F.embedding(ids, table).to(self.device)

    def places(self, x: Tensor) -> Layout:
        """Rows of one document each."""
        return Layout(self.config, x, None, None, None)

    def block(self, layer: int) -> Block:
        """A block with its weights, quantized ones included."""
        prefix, source = self.prefix(layer), self.source
        with torch.device("meta"):
            block = Block(self.config, layer).to(self.dtype)
        if source.plan is not None:
            source.plan.place(block, self.dtype, self.device, prefix)
            own = {prefix + site.parameter: matrix_of(block, site) for site in sites(block)}
            source.fill_matrices({name: m for name, m in own.items() if m is not None})
        plain = {
            name: torch.empty(p.shape, dtype=self.dtype, device=self.device)
            for name, p in block.named_parameters()
        }
        source.fill({prefix + name: tensor for name, tensor in plain.items()})
        block.load_state_dict({**dict(block.named_buffers()), **plain}, strict=True, assign=True)
        return block.requires_grad_(False).eval()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Hidden states of the last block (B, T, D) -> (B, T, V) float32."""
        gain = self.source.read(f"{self.root}model.norm.weight", self.dtype).to(self.device)
        head = self.source.read(f"{self.root}lm_head.weight", self.dtype).to(self.device)
        return F.linear(rms_norm(x, self.config.rms_norm_eps) * gain, head).float()

    @torch.no_grad()
    def run(self, ids: Tensor) -> Tensor:
        """All of it: ids (B, T) -> logits."""
        x = self.embed(ids)
        for layer in range(self.count):
            x = self.block(layer)(x, self.places(x), None)
        return self.logits(x)
