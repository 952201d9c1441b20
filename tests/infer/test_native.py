"""Native leaves and blocks: the same logits, only inside a step, only where they fit."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from herdling.infer import native
from herdling.infer.engine import Engine
from herdling.infer.native import MOST_TOKENS, Native
from herdling.infer.request import Request
from herdling.infer.runner import Runner
from herdling.kernels import cpu
from herdling.model.llama import MLP, Experts, RMSNorm, Router, decoder_of
from herdling.quant.schemes import scheme
from herdling.quant.swap import swap
from tests.infer.conftest import VARIANTS
from tests.infer.test_engine import mixed

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_logits_as_without(make_lm, dtype, monkeypatch):
    lm = make_lm(num_experts_per_tok=2, interleave_moe_layer_step=2)
    lm.model.to(dtype)
    decoder = decoder_of(lm.model)
    ids = torch.arange(MOST_TOKENS)[None]
    with torch.inference_mode():
        want = decoder(ids)
        exact = decoder.double()(ids).float()
        decoder.to(dtype)
        with Native(decoder).leaves(MOST_TOKENS):
            got = decoder(ids)
    size = exact.abs().max()
    if dtype == torch.float32:
        assert (got - want).abs().max() <= 1e-5 * size
    else:  # no further from the exact result than torch's own kernels, give or take
        assert (got - exact).abs().mean() <= 1.2 * (want - exact).abs().mean()


@needs_compiler
def test_every_leaf_is_swapped_for_a_short_step_and_only_then(plain_lm):
    decoder = decoder_of(plain_lm.model)
    leaves = [m for m in decoder.modules() if isinstance(m, nn.Linear | Experts | MLP | RMSNorm)]
    inside_mlp = {child for m in leaves if isinstance(m, MLP) for child in m.children()}
    swap = Native(decoder)
    with swap.leaves(1):
        for module in leaves:
            assert ("forward" in module.__dict__) == (module not in inside_mlp)
    with swap.leaves(MOST_TOKENS + 1):
        assert not any("forward" in m.__dict__ for m in decoder.modules())
    with pytest.raises(KeyError), swap.leaves(1):
        raise KeyError
    assert not any("forward" in m.__dict__ for m in decoder.modules())
    assert any(isinstance(m, Router) for m in leaves)


def test_what_is_altered_already_is_left_alone(make_lm):
    decoder = decoder_of(make_lm().model)
    layer = decoder.model.layers[0]
    own = layer.self_attn.q_proj.forward
    layer.self_attn.q_proj.forward = own

    class Other(nn.Linear):
        pass

    layer.self_attn.k_proj.__class__ = Other
    layer.feed_forward.shared_expert.up_proj.__class__ = Other
    with Native(decoder).leaves(1):
        assert layer.self_attn.q_proj.forward is own
        assert "forward" not in layer.self_attn.k_proj.__dict__
        assert "forward" not in layer.feed_forward.shared_expert.__dict__
        assert "forward" not in layer.feed_forward.shared_expert.up_proj.__dict__


def test_without_a_compiler_torch_does_it(plain_lm, monkeypatch):
    want = plain_lm.engine.run(mixed(plain_lm))
    monkeypatch.setattr(cpu, "available", lambda: False)
    engine = Engine(plain_lm.model, plain_lm.tokenizer)
    monkeypatch.setattr(native.cpu, "linear", None)
    assert [r.ids for r in engine.run(mixed(plain_lm))] == [r.ids for r in want]


# ---- fused blocks


class Watch:
    """Computes every short step twice: as it is, and with torch alone."""

    def __init__(self, monkeypatch) -> None:
        self.steps: list[tuple] = []  # ids up to each row, fused hidden and routes, torch's
        self.fused: list[int] = []  # blocks that each of these steps fused
        run, fuse = Runner.run, Native.fused
        monkeypatch.setattr(Native, "fused", lambda own: self._note(fuse(own)))

        def both(runner, pieces):
            if sum(len(piece.tokens) for piece in pieces) > runner._native.longest:
                return run(runner, pieces)
            own, runner._native = runner._native, Native(decoder_of(runner.model))
            runner._native.fits = False
            theirs = run(runner, pieces)
            runner._native = own
            got = run(runner, pieces)
            rows = [
                torch.tensor([piece.sequence.ids[: at + 1]])
                for piece in pieces
                for at in range(piece.start, piece.end)
            ]
            self.steps.append((rows, *got, *theirs))
            return got

        monkeypatch.setattr(Runner, "run", both)

    def _note(self, blocks: list) -> list:
        self.fused.append(len(blocks))
        return blocks


def uneven(lm, new: int = 12) -> list[Request]:
    """Prompts that stand at other places of a chunk (8 positions) and end up in others."""
    return [Request(list(range(3, 3 + n)), max_tokens=new) for n in (1, 7, 8, 9, 30)]


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_blocks_compute_what_the_model_does(make_lm, variant, monkeypatch):
    lm, watch = make_lm(vision=False, **VARIANTS[variant]), Watch(monkeypatch)
    engine = Engine(lm.model, lm.tokenizer)
    engine.run(uneven(lm))
    engine.run(uneven(lm)[3:4])
    layers = lm.config.text.num_hidden_layers
    assert len(watch.steps) > 12
    assert watch.fused == [layers] * len(watch.steps)
    assert any(len(rows) == 9 for rows, *_ in watch.steps)  # a prompt, over the edge of a chunk
    for _, got, routes, want, their_routes in watch.steps:
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert torch.equal(routes, their_routes)
        assert routes.shape[0] == sum(lm.config.text.is_moe(i) for i in range(layers))


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bfloat16_they_are_no_further_off_than_torch(make_lm, variant, monkeypatch):
    lm, watch = make_lm(vision=False, **VARIANTS[variant]), Watch(monkeypatch)
    lm.model.bfloat16()
    Engine(lm.model, lm.tokenizer).run(uneven(lm))
    norm, exact = decoder_of(lm.model).model.norm, deepcopy(decoder_of(lm.model)).double().model
    errors: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        for rows, got, _, want, _ in watch.steps:
            seen = [exact(exact.embed_tokens(ids), None, None, None)[0, -1] for ids in rows]
            for mine, hidden in zip(errors, (got, want), strict=True):
                mine.append((norm(hidden) - torch.stack(seen)).abs().mean(-1))
    # The median: where rounding decides between two experts, the error is of another kind.
    ours, torchs = (torch.cat(rows).median() for rows in errors)
    assert ours <= 1.2 * torchs


@needs_compiler
@pytest.mark.parametrize("name", ["int4", "mxfp4", "w8a8", "w4a8"])
def test_fused_blocks_of_packed_weights(make_lm, name, monkeypatch):
    """As the quantized leaves do; where activations become integers, one may fall on the other side of a half."""
    lm = make_lm(vision=False, num_experts_per_tok=2)
    swap(lm.model, scheme(name))
    watch = Watch(monkeypatch)
    Engine(lm.model, lm.tokenizer).run(uneven(lm))
    assert watch.fused == [lm.config.text.num_hidden_layers] * len(watch.steps)
    off = [(got - want).norm() / want.norm() for _, got, _, want, _ in watch.steps]
    assert torch.stack(off).median() <= (1e-2 if name.endswith("a8") else 1e-5)


@needs_compiler
def test_formats_without_a_kernel_keep_to_their_leaves(make_lm, monkeypatch):
    lm = make_lm(vision=False)
    swap(lm.model, scheme("fp8"), ["*.layers.1.*"])
    watch = Watch(monkeypatch)
    Engine(lm.model, lm.tokenizer).run(uneven(lm, 2))
    assert set(watch.fused) == {lm.config.text.num_hidden_layers - 1}


@needs_compiler
def test_no_global_layers_no_chunks_no_temperature(make_lm, monkeypatch):
    for fields in (
        dict(no_rope_layer_interval=0, attn_temperature_tuning=False),
        dict(attention_chunk_size=None, num_key_value_heads=1),
    ):
        lm, watch = make_lm(vision=False, **fields), Watch(monkeypatch)
        Engine(lm.model, lm.tokenizer).run(uneven(lm))
        assert watch.fused == [lm.config.text.num_hidden_layers] * len(watch.steps)
        for _, got, _, want, _ in watch.steps:
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@needs_compiler
def test_what_is_altered_is_not_fused_and_moved_weights_are_followed(make_lm, monkeypatch):
    lm, watch = make_lm(vision=False), Watch(monkeypatch)
    engine, layers = Engine(lm.model, lm.tokenizer), decoder_of(lm.model).model.layers
    engine.run(uneven(lm, 2))
    layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out: out * 2)
    layers[1].feed_forward.router.__class__ = type("Other", (Router,), {})
    layers[2].self_attn.o_proj.weight.data = layers[2].self_attn.o_proj.weight.data.clone() * 3
    layers[3].feed_forward.shared_expert.up_proj = deepcopy(layers[0].self_attn.k_proj)
    layers[3].feed_forward.shared_expert.up_proj.weight = nn.Parameter(
        layers[1].feed_forward.shared_expert.up_proj.weight.detach().clone()
    )
    engine.run(uneven(lm, 2))
    assert watch.fused[0] == 4
    assert watch.fused[-1] == 2
    for _, got, routes, want, their_routes in watch.steps:
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert torch.equal(routes, their_routes)


@needs_compiler
@pytest.mark.parametrize("options", [dict(kv="int8"), dict(kv="mixed")])
def test_coded_caches_keep_to_the_leaves(plain_lm, options, monkeypatch):
    monkeypatch.setattr(Native, "fused", None)
    Engine(plain_lm.model, plain_lm.tokenizer, **options).run(mixed(plain_lm))
