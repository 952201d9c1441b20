"""The decoder's leaves on native kernels while a step of few tokens runs, and only then.

Decoding reads every active weight for a handful of tokens, which torch's products do at a quarter to
a half of what the memory gives; `kernels.cpu` does it at nearly all of it. The module tree is not
changed: leaves get another `forward` for the duration of a step. Without a compiler, on other devices
and for longer steps the leaves stay as they are.

Over a plain store it goes further: blocks of plain or quantized leaves are two native calls each
(`kernels.cpu.layer`), attention over the store's slots included, for one new token a sequence or several;
where all blocks are, they are one call. A block with an adapter, a hook, a bias, leaves of another class
or in a format without a kernel keeps to its leaves.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from herdling.errors import InputError
from herdling.kernels import cpu
from herdling.kernels.cpu.layer import Attention, FeedForward, Layers, Tokens, Weight
from herdling.kernels.cpu.packed import Packed
from herdling.kernels.cpu.pages import collapse
from herdling.lora.layers import LoraExperts, LoraLinear
from herdling.model import llama
from herdling.model.llama import MLP, Block, Experts, MoE, RMSNorm, Router, TextLM
from herdling.quant.modules import Matrix, QuantExperts, QuantLinear

MOST_TOKENS = 16
"""Tokens of a step up to which the native products are faster than torch's."""
MOST_FUSED = 64
"""The same where all blocks are one call: in between there is then nothing of torch's either."""
NARROW = 256
"""Width up to which that takes so much of a step that twice as many tokens are."""
MANY_SEEN = 2**14
"""Positions seen by a step's tokens from which on attention is worth torch's threads."""
MANY_ATTENDED = 2**16
"""Positions seen by each of a step's tokens, in all, from which on torch's attention is faster: fused
blocks read them again for each token."""
MANY_LOGITS = 2**19
"""Logits of a step from which on choosing among them is."""


@dataclass
class Step:
    """The tokens of a step, for fused blocks."""

    tokens: dict[bool, Tokens]
    """What they see in layers with RoPE (True) and without."""
    routes: list[Tensor]
    """Where the experts chosen go: (N, k) of each MoE block, or (blocks, N, k) of them all."""


class Native:
    """Swaps the leaves of one decoder."""

    def __init__(self, decoder: TextLM) -> None:
        weight = decoder.model.embed_tokens.weight
        self.longest = MOST_FUSED * (2 if weight.shape[1] <= NARROW else 1)
        """Tokens of a step up to which blocks are better fused."""
        self._leaves: list[tuple[nn.Module, str, Callable]] = []
        kinds = (torch.float32, torch.bfloat16)
        self.fits = weight.device.type == "cpu" and weight.dtype in kinds and cpu.available()
        """Whether there is anything to swap in."""
        if not self.fits:
            return
        collapse(decoder.parameters())
        self._decoder = decoder.model
        self._blocks = [block for block in decoder.model.layers if isinstance(block, Block)]
        self._fused: dict[nn.Module, Fused] = {}
        self._layers: tuple[list[Fused], Layers | None] = [], None
        inside: set[nn.Module] = set()
        for module in decoder.modules():
            forward = None if module in inside else _forward(module)
            if forward is not None:
                self._leaves.append((module, "forward", forward))
                inside.update(module.children())
            elif (plain := _plain(module)) is not None:
                self._leaves.append((module, "plain", plain))

    @contextmanager
    def leaves(self, tokens: int, seen: int = 0, step: Step | None = None) -> Iterator[bool]:
        """Native leaves for a step of so many tokens, if it is short enough; blocks too, given `step`.

        Where they see few positions, `seen` in all, torch does the rest in one thread. Yields whether
        every block is fused, so that there is no rest.
        """
        if not self.fits or tokens > (MOST_TOKENS if step is None else self.longest):
            yield False
            return
        fused = self.fused() if step is not None and not torch.is_grad_enabled() else []
        whole = len(fused) == len(self._blocks)
        if tokens > MOST_TOKENS and not whole:
            yield False
            return
        swapped: list[tuple[nn.Module, str, Callable]]
        if step is not None and whole:
            swapped = [(self._decoder, "blocks", partial(_blocks, self._whole(fused), step))]
        else:
            swapped = [(own.block, "forward", partial(own, step)) for own in fused if step]
            swapped += self._leaves
        for module, name, forward in swapped:
            module.__dict__[name] = forward
        try:
            with cpu.alone() if whole or seen < MANY_SEEN else nullcontext():
                yield whole
        finally:
            for module, name, _ in swapped:
                module.__dict__.pop(name, None)

    def choosing(self, logits: int) -> AbstractContextManager[None]:
        """For what chooses tokens from so many logits: few are not worth waking torch's threads, which
        then get in the way of the next step."""
        return cpu.alone() if self.fits and logits < MANY_LOGITS else nullcontext()

    def fused(self) -> list["Fused"]:
        """The blocks that are plain now, made anew where a weight or a leaf is another one."""
        found, made = [], False
        for block in self._blocks:
            state, fused = _state(block), self._fused.get(block)
            if state is not None and (fused is None or fused.state != state):
                fused, made = Fused(block), True
                self._fused[block] = fused
            if state is not None and fused and fused.fits:
                found.append(fused)
        if made:
            packed = [weight for fused in found for weight in fused.packed]
            collapse(part for weight in packed for part in (weight.codes, weight.scales))
        return found

    def _whole(self, fused: list["Fused"]) -> Layers:
        """All blocks as one call, made anew with any of them."""
        known, layers = self._layers
        if layers is None or known != fused:
            layers = Layers([(block.attend, block.feed) for block in fused])
            self._layers = fused, layers
        return layers


def _blocks(layers: Layers, step: Step, x: Tensor, at: llama.Places, caches: Sequence[Any]) -> Tensor:  # fmt: skip
    """As `Decoder.blocks`; `caches` are the runner's layers, whose memory is written and read."""
    x, chosen = layers(x[0], step.tokens, [cache.memory for cache in caches])
    if chosen is not None:
        step.routes.append(chosen)
    return x[None]


class Fused:
    """A block as two native calls."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.packed: list[Packed] = []
        attn, ff = block.self_attn, block.feed_forward
        norm, after = block.input_layernorm, block.post_attention_layernorm
        mlp = ff.shared_expert if isinstance(ff, MoE) else ff
        d = attn.head_dim
        self.fits = norm.eps == attn.eps
        try:
            q, k, v, o = (_weight(p) for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
            gate, up, down = (_weight(p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            routed = (None, None, None, 0)
            if isinstance(ff, MoE):
                routed = ff.router.weight, *_experts_of(ff.experts), ff.router.top_k
            self.attend = Attention(
                norm.weight, q, k, v, o, heads=attn.q_proj.out_features // d,
                kv_heads=attn.k_proj.out_features // d, eps=norm.eps, local=attn.local,
                qk_norm=attn.qk_norm,
            )  # fmt: skip
            self.feed = FeedForward(after.weight, gate, up, down, after.eps, *routed)
            weights = (q, k, v, o, gate, up, down, *routed[1:3])
            self.packed = [weight for weight in weights if isinstance(weight, Packed)]
        except InputError:  # of several types, or not contiguous: its leaves say so, or can do it
            self.fits = False
        self.state = _state(block)  # with quantized weights in the kernels' layout now

    def __call__(self, step: Step, x: Tensor, at: llama.Places, cache: Any) -> Tensor:
        """As `Block.forward`; `cache` is the runner's layer, whose memory is written and read."""
        x = self.attend(x[0], step.tokens[self.attend.local], cache.memory)
        x, chosen = self.feed(x)
        if chosen is not None:
            step.routes.append(chosen[None])
        return x[None]


def _weight(leaf: nn.Linear) -> Weight:
    """What the kernels multiply with; InputError for a format that they have no kernel for."""
    return _packed(leaf.matrix, leaf) if isinstance(leaf, QuantLinear) else leaf.weight


def _experts_of(leaf: Experts) -> tuple[Weight, Weight]:
    if isinstance(leaf, QuantExperts):
        return _packed(leaf.gate_up_proj, leaf), _packed(leaf.down_proj, leaf)
    return leaf.gate_up_proj, leaf.down_proj


def _packed(matrix: Matrix, leaf: QuantLinear | QuantExperts) -> Weight:
    packed = matrix.packed(leaf.activations)
    if packed is None:
        raise InputError(f"no kernel for {matrix.form.name} with these activations")
    return packed


PLAIN = {Block, llama.Attention, MoE, MLP, Router, Experts, RMSNorm, nn.Linear, QuantLinear,
         QuantExperts, Matrix}  # fmt: skip


def _state(block: nn.Module) -> list | None:
    """What tells whether a fused block is stale: its modules and where its weights lie.

    None for a block that is altered in any way. Read at every step, so it goes by torch's own
    dictionaries.
    """
    modules: list[nn.Module] = [block]
    state: list = []
    for module in modules:  # grows
        own = module.__dict__
        if type(module) not in PLAIN or "forward" in own:
            return None
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_parameters"].get("bias") is not None:  # fmt: skip
            return None
        modules += own["_modules"].values()
        state.append(module)
        if type(module) is Matrix:
            state.append(own["_packed"])
        for weight in (*own["_parameters"].values(), *own["_buffers"].values()):
            if weight is not None:
                state.append((weight.data_ptr(), weight.dtype))
    return state


def _forward(module: nn.Module) -> Callable | None:
    """The native forward of a plain leaf; None for anything else, and for what is already altered."""
    plain = all(type(child) is nn.Linear for child in module.children())
    if "forward" in module.__dict__ or not plain:
        return None
    native = NATIVE.get(type(module))  # a subclass is something else
    return native and partial(native, module)


def _plain(module: nn.Module) -> Callable | None:
    """The native form of what an adapted leaf does without its adapters."""
    if getattr(module, "over", None) not in (nn.Linear, Router, Experts):
        return None
    if isinstance(module, LoraLinear):
        return lambda x: cpu.linear(x, module.base)
    return partial(_experts, module) if isinstance(module, LoraExperts) else None


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return cpu.linear(x, layer.weight)


def _mlp(layer: MLP, x: Tensor) -> Tensor:
    return cpu.swiglu(x, layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight)


def _norm(layer: RMSNorm, x: Tensor) -> Tensor:
    return cpu.rms_norm(x, layer.weight, layer.eps)


def _experts(layer: Experts, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    return cpu.experts(x, chosen, gates, layer.gate_up_proj, layer.down_proj)


def _router(layer: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.choose(cpu.linear(x, layer.weight), x.dtype)


NATIVE: dict[type[nn.Module], Callable] = {
    nn.Linear: _linear,
    MLP: _mlp,
    RMSNorm: _norm,
    Experts: _experts,
    Router: _router,
}
