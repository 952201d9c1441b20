"""Whole formats against formulas written out here in float64, one block at a time."""

import math

import pytest
import torch

from herdling.errors import ConfigError
from herdling.quant import formats
from herdling.quant.formats import FORMATS, format_of, quantize, round_trip
from herdling.quant.schemes import SCHEMES, scheme

MX = {
    # name: (values not negative, exponent of the largest)
    "mxfp8_e4m3": (4, 3, 448.0),
    "mxfp8_e5m2": (5, 2, 57344.0),
    "mxfp6_e2m3": (2, 3, 7.5),
    "mxfp6_e3m2": (3, 2, 28.0),
    "mxfp4_e2m1": (2, 1, 6.0),
    "mxint8": (0, 6, 127 / 64),
}
MODES = ("floor", "ceil", "even", "rceil")


def numbers_of(name: str) -> list[float]:
    """All numbers of an MX element that are not negative, ascending; even places are even codes."""
    E, M, top = MX[name]
    if name == "mxint8":
        return [i / 64 for i in range(128)]
    bias = 2 ** (E - 1) - 1
    found = [m / 2**M * 2.0 ** (1 - bias) for m in range(2**M)]
    found += [(1 + m / 2**M) * 2.0 ** (e - bias) for e in range(1, 2**E) for m in range(2**M)]
    return [v for v in found if v <= top]


def nearest(v: float, numbers: list[float], rounding: str) -> float:
    size = min(abs(v), numbers[-1])
    above = next(i for i, n in enumerate(numbers) if n >= size)
    if numbers[above] == size:
        return math.copysign(size, v)
    low, high = size - numbers[above - 1], numbers[above] - size
    up = high < low or (high == low and (rounding == "away" or above % 2 == 0))
    return math.copysign(numbers[above if up else above - 1], v)


def exponent(a: float, numbers: list[float], M: int, mode: str) -> int:
    emax = math.frexp(numbers[-1])[1] - 1
    part, e = math.frexp(a)
    if mode == "even":  # to M bits after the point, ties up
        part, e = math.frexp(math.ldexp(math.floor(part * 2 ** (M + 1) + 0.5), e - M - 1))
    s = e - 1 - emax
    if mode == "ceil" and part > 0.5:
        s += 1
    if mode == "rceil":
        s = next(s for s in range(e - 3 - emax, e + 3) if a <= math.ldexp(numbers[-1], s))
    return min(max(s, -127), 127)


def reference(block: list[float], name: str, mode: str, rounding: str) -> list[float]:
    numbers, most = numbers_of(name), max(abs(v) for v in block)
    if most == 0:
        return [0.0] * len(block)
    s = exponent(most, numbers, MX[name][1], mode)
    return [math.ldexp(nearest(math.ldexp(v, -s), numbers, rounding), s) for v in block]


def families() -> torch.Tensor:
    """Blocks: normal, far from 1, ties of bf16, just around powers of two, and subnormal."""
    normal = torch.randn(12, 32)
    far = torch.randn(12, 32) * torch.exp2(torch.randint(-100, 100, (12, 1)).float())
    ties = torch.randn(12, 32).bfloat16().float()
    power = torch.exp2(torch.randint(-5, 5, (12, 32)).float())
    just = torch.nextafter(power, torch.zeros(())) * torch.randn(12, 32).sign()
    edges = torch.zeros(3, 32)
    edges[1, 0], edges[2, :2] = 1e-45, torch.tensor([3.4028234e38, 1.0])
    small = torch.randn(12, 32) * torch.exp2(torch.arange(-148.0, -124, 2)[:, None])
    return torch.cat([normal, far, ties, power, just, edges, small])


@pytest.mark.parametrize("rounding", ["even", "away"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MX)
def test_mx_is_exact(name, mode, rounding):
    x = families()
    got = quantize(x, name, mode=mode, rounding=rounding).dequantize()
    wanted = [reference(block, name, mode, rounding) for block in x.double().tolist()]
    assert torch.equal(got, torch.tensor(wanted, dtype=torch.float64).float())


SQNR = {  # measured with two other implementations: spec, N(0, 1), 512 x 1024
    "floor": (30.66, 25.36, 30.93, 25.36, 18.78),
    "rceil": (31.52, 25.53, 30.96, 25.53, 18.74),
    "ceil": (31.51, 25.55, 28.75, 25.55, 16.81),
    "even": (31.19, 25.53, 30.99, 25.53, 19.03),
}


@pytest.mark.parametrize("mode", MODES)
def test_mx_noise(mode):
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    for name, wanted in zip(MX, SQNR[mode], strict=False):
        error = x - round_trip(x, name, mode=mode)
        noise = 10 * math.log10(x.square().sum() / error.square().sum())
        assert noise == pytest.approx(wanted, abs=0.05), name


@pytest.mark.parametrize("name", MX)
def test_transposed_weights_need_a_cast_of_their_own(name):
    x = torch.randn(64, 96)
    rows, columns = round_trip(x, name), round_trip(x.T, name).T
    assert not torch.equal(rows, columns)
    assert torch.equal(round_trip(x, name, dim=0), columns)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_decodes_packs_and_measures(name, kind):
    x = torch.randn(3, 96, 40).to(kind)
    q = quantize(x, name, dim=1)
    assert q.dequantize().dtype == kind
    assert torch.equal(q.dequantize(), round_trip(x, name, dim=1))
    assert q.nbytes == q.packed().nbytes + q.scales.nbytes
    assert q.packed().shape[1] == math.ceil(96 * q.form.bits / 8)
    for e in range(3):  # no block crosses an expert, and inputs are dimension 1
        own = quantize(x[e].T.contiguous(), name)
        exact = 0.0 if name != "ternary" else 1e-2 if kind != torch.float32 else 1e-5  # a mean
        torch.testing.assert_close(q.dequantize()[e], own.dequantize().T, rtol=exact, atol=0)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.per == "group"])
def test_a_last_group_may_be_shorter(name):
    form = FORMATS[name]
    x = torch.randn(5, form.group + 7)
    q = quantize(x, name)
    tail = quantize(x[:, form.group :], name)
    assert q.scales.shape == (5, 2)
    assert torch.equal(q.dequantize()[:, form.group :], tail.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_what_is_no_number(name):
    x = torch.randn(4, 256)
    x[0] = 0
    form = format_of(name, per="row") if name == "ternary" else FORMATS[name]
    assert torch.equal(quantize(x, form).dequantize()[0], torch.zeros(256))
    x[1, 3], x[2, 3] = torch.inf, torch.nan
    q = quantize(x, form)
    back = q.dequantize()
    block = form.group or 256
    assert back[1:3, :block].isnan().all()
    assert back[[0, 3]].isfinite().all()
    assert back[:, block:].isfinite().all()
    torch.testing.assert_close(back, round_trip(x, form), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "divisor", "codes"),
    [("int4_g32", 7.0, (-7, 7)), ("int4_g128", 8.0, (-8, 7)), ("int8", 127.0, (-127, 127))],
)
def test_integer_scales(name, divisor, codes):
    x = torch.randn(8, 256).clamp(-3.9, 3.9)
    x[:, ::32] = 4.0 * torch.tensor([1.0, -1.0]).repeat(4)[:, None]  # largest of each group
    q = quantize(x, name, divisor=divisor, scale_dtype=torch.float32)
    assert (q.codes.min(), q.codes.max()) == codes
    assert torch.equal(q.scales, torch.full_like(q.scales, 4.0 / divisor))
    wanted = [[min(max(round(v), codes[0]), codes[1]) for v in row] for row in (x * (divisor / 4.0)).tolist()]  # fmt: skip
    assert q.codes.tolist() == wanted


@pytest.mark.parametrize("name", ["int8", "int4_g32", "int3_g32", "int2_g32"])
def test_no_integer_error_exceeds_half_a_step(name):
    x = torch.randn(64, 256)
    q = quantize(x, name, scale_dtype=torch.float32)
    step = q.scales.repeat_interleave(256 // q.scales.shape[1], 1)
    assert ((q.dequantize() - x).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_scales(name):
    x = torch.randn(4, 256, 384) * torch.tensor([1.0, 10.0, 0.1, 1e-3])[:, None, None]
    top = format_of(name).divisor
    shapes = {"tensor": (1, 1, 1), "expert": (4, 1, 1), "row": (4, 1, 384), "square": (4, 2, 3)}
    for per, shape in shapes.items():
        q = quantize(x, name, dim=1, per=per, group=128)
        assert tuple(q.scales.shape) == shape
        a, b, c = (n // m for n, m in zip(x.shape, shape, strict=True))
        for i, j, k in ((0, 0, 0), (shape[0] - 1, shape[1] - 1, shape[2] - 1)):
            block = x[i * a : (i + 1) * a, j * b : (j + 1) * b, k * c : (k + 1) * c]
            scale = block.abs().max() / top
            assert q.scales[i, j, k] == scale
            cast = torch.float8_e4m3fn if name == "fp8_e4m3" else torch.float8_e5m2
            torch_own = (block * (1 / scale)).clamp(-top, top).to(cast).float() * scale
            got = q.dequantize()[i * a : (i + 1) * a, j * b : (j + 1) * b, k * c : (k + 1) * c]
            assert torch.equal(got, torch_own)


def test_scales_that_are_powers_of_two_never_overflow():
    x = torch.randn(64, 64)
    x[0, 0] = 448.0 * 2**-5  # its scale is one already
    q = quantize(x, "fp8_e4m3", powers_of_two=True)
    assert torch.equal(q.scales.log2(), q.scales.log2().round())
    assert q.scales[0] == 2.0**-5
    exact = x.abs().amax(1, keepdim=True) / 448
    assert (q.scales >= exact).all()
    assert (q.scales < 2 * exact).all()


def test_ternary_is_the_formula():
    x = torch.randn(2, 33, 20)
    for e, expert in enumerate(quantize(x, "ternary", dim=1).dequantize()):
        mean = x[e].abs().mean()
        torch.testing.assert_close(expert, (x[e] / mean).round().clamp(-1, 1) * mean)


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match="no format 'int5'; there are: int8"):
        quantize(torch.randn(2, 2), "int5")
    with pytest.raises(ConfigError, match="no option 'grp'"):
        quantize(torch.randn(2, 2), "int8", grp=3)
    with pytest.raises(ConfigError, match="say group=128"):
        quantize(torch.randn(2, 2), "fp8_e4m3", per="square")
    with pytest.raises(ConfigError, match="dim 2"):
        quantize(torch.randn(2, 2), "int8", dim=2)
    with pytest.raises(ConfigError, match="no format 'w3a3'"):
        scheme("w3a3")


def test_bits_a_number():
    x = torch.randn(256, 1024)
    bits = {name: quantize(x, name).nbytes * 8 / x.numel() for name in FORMATS}
    assert bits["int4_g32"] == 4.5
    assert bits["int4_g128"] == 4.125
    assert bits["mxfp4_e2m1"] == 4.25
    assert bits["mxfp6_e3m2"] == 6.25
    assert bits["nf4"] == 4.5
    assert bits["int3_g32"] == 3.5


def test_metas_int4():
    """llama-models, quantize_impls.py: groups of 128 inputs, scale max(|w|, 1e-6) / 8, codes -8 .. 7."""
    x = torch.randn(6, 256)
    x[0, :128] = 0
    q = quantize(x, scheme("meta-int4", scale_dtype=torch.float32).weights)
    groups = x.view(6, 2, 128)
    scale = groups.abs().amax(-1).clamp(min=1e-6) / 8
    assert torch.equal(q.scales, scale)
    codes = (groups * (1 / scale)[..., None]).round().clamp(-8, 7)
    assert torch.equal(q.codes.float(), codes.view(6, 256))
    assert SCHEMES["meta-int4"].kinds == ("experts", "shared")


def test_metas_fp8():
    found = SCHEMES["meta-fp8"]
    assert (found.kinds, found.skip_ends) == (("experts",), True)
    assert found.weights == formats.FORMATS["fp8_e4m3"]
    tokens = torch.tensor([[3000.0, 600.0], [12.0, 6.0]])
    back = round_trip(tokens, found.activations)  # type: ignore[arg-type]
    assert back.tolist() == [[1200.0, 600.0], [12.0, 6.0]]
