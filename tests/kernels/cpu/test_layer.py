"""A fused half layer against the model's own in float32, and no further from float64 than torch in bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.errors import InputError
from herdling.kernels.attention import attend_last
from herdling.kernels.cpu import packed
from herdling.kernels.cpu.layer import Attention, FeedForward, Layers, Memory, Tokens
from herdling.kernels.grouped_matmul import routed_experts
from herdling.kernels.rope import rotate
from herdling.model.llama import rms_norm
from tests.kernels.cpu.test_dense import DTYPES, off, random
from tests.kernels.cpu.test_packed import quantized

# (N, D, H, KV, d, slots seen): one head and grouped ones, widths beside a vector's, ranges of 256 and over.
ATTENTION = [(1, 64, 4, 2, 16, [1]), (3, 48, 8, 1, 10, [5, 256, 257]), (2, 72, 6, 6, 34, [700, 3]), (7, 96, 10, 2, 64, [40] * 7)]  # fmt: skip
ROUTED = [
    (1, 384, 200, 40, 4, 1),
    (5, 48, 33, 20, 6, 2),
    (16, 40, 24, 24, 130, 2),
]  # (N, D, F, I, E, k)


@pytest.fixture(autouse=True)
def _no_grad(native):
    with torch.no_grad():
        yield


def attention_case(N: int, D: int, H: int, KV: int, d: int, seen: list[int]):
    gain = 1 + 0.1 * random(D, seed=1)
    weights = [random(rows, D, seed=2 + i) * D**-0.5 for i, rows in enumerate((H * d, KV * d, KV * d))]  # fmt: skip
    weights.append(random(D, H * d, seed=5) * (H * d) ** -0.5)
    total = sum(seen) + 40
    keys, values = random(total, KV, d, seed=6), random(total, KV, d, seed=7)
    order = torch.randperm(total - 10, generator=torch.Generator().manual_seed(8))
    slots = list(order[: sum(seen)].split(seen))
    angles = random(N, d // 2, seed=9) * 3
    temperature = 1 + random(N, seed=10).abs()
    return random(N, D), gain, weights, keys, values, slots, angles, temperature


def torch_attention(x, gain, weights, keys, values, slots, angles, temperature, H, KV, local, norm):
    """As `model.llama.Attention` among `Block`; keys and values are written to in place."""
    q, k, v, o = weights
    h = rms_norm(x, 1e-5) * gain
    heads = [F.linear(h, w).unflatten(-1, (-1, keys.shape[2])) for w in (q, k, v)]
    q, k, v = heads
    if local:
        cos, sin = angles.cos()[None], angles.sin()[None]
        q, k = rotate(q[None], cos, sin)[0], rotate(k[None], cos, sin)[0]
        if norm:
            q, k = rms_norm(q, 1e-5), rms_norm(k, 1e-5)
    elif temperature is not None:
        q = (q * temperature[:, None, None]).to(q.dtype)
    fresh = torch.stack([s[-1] for s in slots])
    keys[fresh], values[fresh] = k, v
    out = [
        attend_last(q[i][None, None], keys[s][None], values[s][None]) for i, s in enumerate(slots)
    ]
    return x + F.linear(torch.cat(out)[:, 0].flatten(1), o)


@pytest.mark.parametrize("kind", ["local", "norm", "global", "temperature"])
@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(shape, kind, dtype):
    H, KV, d = shape[2:5]
    x, gain, weights, keys, values, slots, angles, temperature = attention_case(*shape)
    local, norm = kind in ("local", "norm"), kind == "norm"
    temperature = temperature if kind == "temperature" else None
    typed = [t.to(dtype) for t in (x, gain, *weights, keys, values)]

    def reference(*t: Tensor) -> tuple[Tensor, ...]:
        x, gain, *weights, keys, values = t
        keys, values = keys.clone(), values.clone()
        y = torch_attention(x, gain, weights, keys, values, slots, angles, temperature, H, KV, local, norm)  # fmt: skip
        return y, keys, values

    want = reference(*typed)
    exact = reference(*(t.double() for t in typed))
    x, gain, *weights, keys, values = typed
    pad = torch.zeros(13, KV, d, dtype=dtype)
    keys, values = torch.cat([pad, keys]), torch.cat([pad, values])
    step = Tokens(
        slots, torch.stack([s[-1] for s in slots]), angles.cos(), angles.sin(), temperature
    )
    half = Attention(gain, *weights, heads=H, kv_heads=KV, eps=1e-5, local=local, qk_norm=norm)
    got = half(x, step, Memory(keys, values, 13)), keys[13:], values[13:]
    assert not keys[:13].any()
    for mine, torchs, true in zip(got, want, exact, strict=True):
        assert mine.dtype == dtype
        assert off(mine, true) <= max(1.2 * off(torchs, true), 1e-6)


def forward_case(N: int, D: int, inner: int, narrow: int, E: int, k: int):
    weights = dict(gain=1 + 0.1 * random(D, seed=1), gate=random(inner, D, seed=2) * 0.2,
                   up=random(inner, D, seed=3) * 0.2, down=random(D, inner, seed=4) * 0.2)  # fmt: skip
    routed = dict(router=random(E, D, seed=5), gate_up=random(E, D, 2 * narrow, seed=6) * 0.2,
                  outs=random(E, narrow, D, seed=7) * 0.2)  # fmt: skip
    return random(N, D), weights, routed


def torch_forward(x, w, routed, k, chosen=None):
    h = rms_norm(x, 1e-5) * w["gain"]
    y = F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])
    if not k:
        return x + y, None
    logits = F.linear(h, routed["router"])
    chosen = logits.topk(k).indices if chosen is None else chosen
    gates = torch.sigmoid(logits.gather(1, chosen).to(torch.promote_types(x.dtype, torch.float32)))
    more = routed_experts(h, chosen, gates.to(x.dtype), routed["gate_up"], routed["outs"])
    return x + (y + more), chosen


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", ROUTED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward(shape, dense, dtype):
    x, weights, routed = forward_case(*shape)
    k = 0 if dense else shape[-1]
    x, weights = x.to(dtype), {name: w.to(dtype) for name, w in weights.items()}
    routed = {} if dense else {name: w.to(dtype) for name, w in routed.items()}
    got, chosen = FeedForward(**weights, eps=1e-5, **routed, k=k)(x)
    want, _ = torch_forward(x, weights, routed, k, chosen)
    if k and dtype == torch.float32:
        assert torch.equal(chosen, torch_forward(x, weights, routed, k)[1])
    wide = [{name: w.double() for name, w in each.items()} for each in (weights, routed)]
    exact, _ = torch_forward(x.double(), *wide, k, chosen)
    assert off(got, exact) <= max(1.2 * off(want, exact), 1e-6)
    assert got.dtype == dtype


@pytest.mark.parametrize(
    ("E", "k"), [(4, 1), (16, 1), (16, 2), (33, 3), (64, 1), (128, 1), (130, 2)]
)
def test_equal_logits_are_told_apart_as_topk_does(E, k):
    x, weights, routed = forward_case(1, 32, 8, 8, E, k)
    for seed in range(30):
        values = torch.randint(0, 3, (E,), generator=torch.Generator().manual_seed(seed)).float()
        routed["router"] = values[:, None].expand(E, 32).contiguous()
        _, chosen = FeedForward(**weights, eps=1e-5, **routed, k=k)(x)
        h = rms_norm(x, 1e-5) * weights["gain"]
        want = ((values * h.sum()) + 0).topk(k).indices
        assert chosen is not None
        assert chosen[0].tolist() == want.tolist()


FORMATS = ["int8", "int4-g32", "mxfp4", "ternary"]


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_attention(form, floats, dtype):
    """Weights of two kinds; against the plain half with the same numbers and products of `packed`."""
    shape = ATTENTION[3]
    _, D, H, KV, d, _ = shape
    x, gain, weights, keys, values, slots, angles, _ = attention_case(*shape)
    q, wide_q = quantized(H * d, D, form=form, floats=floats)
    o, wide_o = quantized(D, H * d, form=form, seed=3, floats=floats)
    x, gain, keys, values, k, v = (t.to(dtype) for t in (x, gain, keys, values, *weights[1:3]))
    step = Tokens(slots, torch.stack([s[-1] for s in slots]), angles.cos(), angles.sin(), None)
    options = dict(heads=H, kv_heads=KV, eps=1e-5, local=True, qk_norm=True)
    stores = [(keys.clone(), values.clone()) for _ in range(2)]
    got = Attention(gain, q, k, v, o, **options)(x, step, Memory(*stores[0]))
    plain = [w.to(dtype).contiguous() for w in (wide_q, wide_o)]
    want = Attention(gain, plain[0], k, v, plain[1], **options)(x, step, Memory(*stores[1]))
    rounding = 0.03 if not floats else 1e-5 if dtype == torch.float32 else 0.02
    assert (got - want).norm() <= rounding * (want - x).norm()
    assert torch.equal(stores[0][0], stores[1][0])  # keys and values are plain


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_feed_forward(form, floats, dtype, dense):
    """In float32 what the single packed products make, one after the other."""
    N, D, inner, narrow, E, k = 5, 64, 48, 40, 6, 2
    x, weights, routed = forward_case(N, D, inner, narrow, E, k)
    gate, up, down = (
        quantized(*rows, form=form, seed=i, floats=floats)[0]
        for i, rows in enumerate([(inner, D), (inner, D), (D, inner)])
    )
    gate_up, outs = (
        quantized(*rows, form=form, seed=5 + i, floats=floats)[0]
        for i, rows in enumerate([(E, 2 * narrow, D), (E, D, narrow)])
    )
    x, gain, router = (t.to(dtype) for t in (x, weights["gain"], routed["router"]))
    chosen, more = None, (None, None, None, 0)
    if not dense:
        more = router, gate_up, outs, k
    got, chosen = FeedForward(gain, gate, up, down, 1e-5, *more)(x)
    h = rms_norm(x, 1e-5) * gain
    want = packed.linear(F.silu(packed.linear(h, gate)) * packed.linear(h, up), down)
    if not dense:
        logits = F.linear(h, router)
        assert chosen is not None
        assert torch.equal(chosen, logits.topk(k).indices)
        gates = torch.sigmoid(logits.gather(1, chosen).float()).to(dtype)
        want = want + packed.experts(h, chosen, gates, gate_up, outs)
    size = want.norm()
    assert (got - (x + want)).norm() <= (3e-3 if dtype == torch.float32 else 2e-2) * size


def test_all_layers_in_one_call_are_the_halves_in_turn():
    shape = ATTENTION[3]
    N, D, H, KV = shape[:4]
    x, gain, weights, keys, values, slots, angles, temperature = attention_case(*shape)
    fresh = torch.stack([s[-1] for s in slots])
    tokens = {
        local: Tokens(slots, fresh, angles.cos(), angles.sin(), None if local else temperature)
        for local in (True, False)
    }
    _, own, routed = forward_case(N, D, 33, 20, 6, 2)
    halves = []
    for local, experts in ((True, True), (False, False), (True, True)):
        attention = Attention(gain, *weights, heads=H, kv_heads=KV, eps=1e-5, local=local, qk_norm=local)  # fmt: skip
        halves.append((attention, FeedForward(**own, eps=1e-5, **(routed if experts else {}), k=2 * experts)))  # fmt: skip
    want, routes, stores = x, [], []
    for attention, forward in halves:
        stores.append((keys.clone(), values.clone()))
        want, chosen = forward(attention(want, tokens[attention.local], Memory(*stores[-1])))
        routes += [] if chosen is None else [chosen]
    mine = [(keys.clone(), values.clone()) for _ in halves]
    got, chosen = Layers(halves)(x, tokens, [Memory(*store) for store in mine])
    assert torch.equal(got, want)
    assert chosen is not None
    assert torch.equal(chosen, torch.stack(routes))
    for ours, theirs in zip(mine, stores, strict=True):
        assert torch.equal(ours[0], theirs[0])
    with pytest.raises(InputError, match="slots"):
        Layers(halves)(x, tokens, [Memory(keys[:1], values[:1])] * 3)


def test_routing_is_topk_and_sigmoid(native):
    logits = random(50, 16)
    for k in (1, 2, 16):
        chosen, gates = torch.empty(50, k, dtype=torch.int64), torch.empty(50, k)
        native.herdling_route(logits.data_ptr(), chosen.data_ptr(), gates.data_ptr(), 50, 16, k)
        want = logits.topk(k)
        assert torch.equal(chosen, want.indices)
        torch.testing.assert_close(gates, want.values.sigmoid())


def test_what_does_not_fit_is_refused_by_name():
    x, gain, weights, keys, values, slots, angles, _ = attention_case(*ATTENTION[0])
    step = Tokens(slots, slots[0][-1:], angles.cos(), angles.sin(), None)
    options = dict(heads=4, kv_heads=2, eps=1e-5, local=True, qk_norm=False)
    half = Attention(gain, *weights, **options)
    before = keys.clone()
    with pytest.raises(InputError, match="slots"):
        half(x, step, Memory(keys[:1], values[:1], 1))
    assert torch.equal(keys, before)
    with pytest.raises(InputError, match="with 1 tokens"):
        half(x.expand(2, -1), step, Memory(keys, values))
    with pytest.raises(InputError, match="bfloat16"):
        half(x, step, Memory(keys.bfloat16(), values.bfloat16()))
    with pytest.raises(InputError, match="o is"):
        Attention(gain, *weights[:3], weights[3][:-1], **options)
    with pytest.raises(InputError, match="int64"):
        Tokens([slots[0].int()], slots[0][-1:], angles.cos(), angles.sin(), None)
    with torch.enable_grad(), pytest.raises(InputError, match="no_grad"):
        half(x, step, Memory(keys, values))
    x, weights, routed = forward_case(*ROUTED[0])
    with pytest.raises(InputError, match="0 of 4"):
        FeedForward(**weights, eps=1e-5, **routed)
    with pytest.raises(InputError, match="float64"):
        FeedForward(**weights, eps=1e-5)(x.double())
    wrong, _ = quantized(16, 32, form="int8")
    with pytest.raises(InputError, match="gate holds 0 experts, 16 outputs of 32"):
        FeedForward(weights["gain"], wrong, wrong, wrong, 1e-5)
    one, _ = quantized(4, 2 * 40, 384, form="int8")
    with pytest.raises(InputError, match="both be packed"):
        FeedForward(**weights, eps=1e-5, **{**routed, "gate_up": one}, k=1)
