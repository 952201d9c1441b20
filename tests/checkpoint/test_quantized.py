"""Quantized folders: the compressed-tensors library and transformers read ours, we read theirs."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdling.checkpoint import Card, Folder, open_model, save_model
from herdling.errors import CheckpointError, ConfigError
from herdling.kernels import cpu
from herdling.model import weights
from herdling.model.sites import sites
from herdling.quant import elements
from herdling.quant.formats import Format, quantize
from herdling.quant.modules import Matrix, QuantExperts, QuantLinear
from herdling.quant.schemes import scheme
from herdling.quant.swap import matrix_of, swap

STORED = ("int8", "w8a8", "int4", "w4a8", "fp8", "mxfp8", "mxfp6", "mxfp4", "ternary", "mxint8",
          "int3_g32", "meta-fp8")  # fmt: skip
FEW = ("int4", "w8a8", "fp8", "mxfp4")
IDS = torch.arange(3, 45).view(2, 21)


@pytest.fixture(scope="module")
def make_folder(make_model, tmp_path_factory):
    """make_folder(scheme name, dtype, shard_bytes) -> (folder, the quantized model it was made of)."""

    def make(name, dtype=torch.float32, shard_bytes=10**9, vision=False):
        model = make_model(vision=vision).to(dtype)
        swap(model, scheme(name))
        folder = tmp_path_factory.mktemp(name) / "model"
        save_model(model, model.config, folder, card=Card("toy"), shard_bytes=shard_bytes)
        return folder, model

    return make


@pytest.mark.skipif(not cpu.available(), reason="no native kernels on this machine")
def test_ternary_experts_keep_their_kernel_in_a_folder(make_folder):
    folder, model = make_folder("ternary")
    again, _ = open_model(folder)
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
        for module in again.modules():
            if isinstance(module, QuantExperts):
                assert module.packed(torch.zeros(1, module.gate_up_proj.inputs)) is not None


@pytest.mark.skipif(not cpu.available(), reason="no native kernels on this machine")
def test_two_bits_with_a_fourth_number_have_no_ternary_kernel():
    form = Format("int2", elements.integers(2), divisor=1.5)
    weight = torch.tensor([[-2.0, 1.0, 0.0, 1.0] * 8] * 16)
    assert Matrix.of(weight, form).kernel is None
    assert Matrix.of(weight.clamp(min=-1), replace(form, divisor=1.0)).kernel is not None


def plain_activations(model):
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantExperts):
            module.activations = None
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STORED)
def test_what_is_written_reads_back_exactly(make_folder, name, dtype):
    folder, model = make_folder(name, dtype)
    again, _ = open_model(folder)
    assert again.lm_head.weight.dtype == dtype
    assert torch.equal(again(IDS), model(IDS))
    source = Folder.open(folder)
    for site in sites(model):  # dequantized, for whoever wants plain weights
        matrix = matrix_of(model, site)
        if matrix is not None:
            wanted = matrix.dense().mT if matrix.experts else matrix.dense()
            assert torch.equal(source.read(site.parameter), wanted)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in STORED])  # fmt: skip
def test_transformers_reads_the_same_weights_and_says_the_same(make_folder, name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    folder, model = make_folder(name, vision=name == "int4")
    kind = "Llama4ForConditionalGeneration" if name == "int4" else "Llama4ForCausalLM"
    theirs, report = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        # The first call unpacks all weights. MX ones become bfloat16 whatever the model is.
        if name.startswith("mxfp"):
            with pytest.raises(RuntimeError, match="BFloat16"):
                theirs(IDS)
            torch.nn.Module.float(theirs)  # its own refuses
        theirs(IDS)
        quantized = [(n, m) for n, m in theirs.named_modules() if hasattr(m, "quantization_scheme")]
        parts = {stored: part for stored, (part, _) in Folder.open(folder).plan.parts.items()}
        found = {site.parameter: matrix_of(model, site) for site in sites(model)}
        names = {part.name: part for part in parts.values()}
        assert len(quantized) == len(names)
        prefix = "model." if name == "int4" else ""
        for full, module in quantized:
            stem = full if full in names else full.removeprefix(prefix).replace("language_model.", "language_model.model.", 1)  # fmt: skip
            part = names[stem]
            dense = found[part.site.parameter].dense(expert=part.expert)[part.rows]
            assert torch.equal(module.weight, dense), full
            # Their own forward gives rows of experts one scale for all, not one a token.
            module.quantization_enabled = False
        logits = theirs(IDS).logits
    torch.testing.assert_close(plain_activations(model)(IDS), logits, rtol=1e-3, atol=2e-4)


def by_their_compressor(folder, out, weights_args, layout, activations=None):
    """A plain folder compressed by the compressed-tensors library, one linear at a time."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights_args)
    acts = QuantizationArgs(**activations) if activations else None
    group = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=acts, format=layout
    )
    shutil.copytree(folder, out)
    source, tensors = Folder.open(folder), {}
    slots = weights.per_expert(source.config)
    plain = {name: source.read(name) for name in weights.shapes(source.config)}
    compressor = BaseCompressor.get_value_from_registry(layout)
    linears = {name: slot.view(plain[slot.parameter]).contiguous() for name, slot in slots.items()}
    linears |= {n: w for n, w in plain.items() if "_proj.weight" in n}
    for name, weight in linears.items():
        tiles = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
        scale, _ = calculate_qparams(tiles.amin(-1), tiles.amax(-1), args)
        made = compressor.compress({"weight": weight, "weight_scale": scale}, group)
        stem = name.removesuffix("weight")
        tensors |= {stem + last: t.contiguous() for last, t in made.items()}
    tensors |= {n: w for n, w in plain.items() if n not in linears and "experts." not in n.replace("shared_expert", "")}  # fmt: skip
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = QuantizationConfig(
        config_groups={"group_0": group}, format=layout, quantization_status="compressed",
        ignore=["lm_head", "re:.*router"],
    )  # fmt: skip
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"] = json.loads(json.dumps(config.to_dict(), default=str))
    (out / "config.json").write_text(json.dumps(raw))


TOKEN = dict(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
THEIRS = {
    "W4A16": (dict(num_bits=4, type="int", strategy="group", group_size=32), "pack-quantized", None),
    "W8A16": (dict(num_bits=8, type="int", strategy="channel"), "pack-quantized", None),
    "W8A8": (dict(num_bits=8, type="int", strategy="channel"), "int-quantized", TOKEN),
    "W4A8": (dict(num_bits=4, type="int", strategy="group", group_size=32), "pack-quantized", TOKEN),
    "FP8": (dict(num_bits=8, type="float", strategy="channel"), "float-quantized",
            {**TOKEN, "type": "float"}),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_their_compressor_writes(make_model, tmp_path, name):
    pytest.importorskip("compressed_tensors")
    model = make_model()
    save_model(model, model.config, tmp_path / "plain", card=Card("toy"))
    args, layout, acts = THEIRS[name]
    by_their_compressor(tmp_path / "plain", tmp_path / "theirs", args, layout, acts)
    again, _ = open_model(tmp_path / "theirs")
    form = {"W4A16": "int4", "W4A8": "int4", "FP8": "fp8"}.get(name, "int8")
    wanted = replace(scheme(form, scale_dtype=torch.float32), activations=None)
    for site in sites(model):
        matrix = matrix_of(again, site)
        if site.kind in ("head", "router"):
            assert matrix is None
            continue
        plain = model.get_parameter(site.parameter).detach()
        ours = quantize(plain, wanted.weights, dim=1).dequantize()
        dense = matrix.dense().mT if matrix.experts else matrix.dense()
        # Their scales come by a quotient, our codes by a reciprocal: at ties a step apart.
        assert (dense != ours).float().mean() < 0.02
        torch.testing.assert_close(dense, ours, rtol=0, atol=plain.abs().max().item() / 6)
    module = again.model.layers[0].self_attn.q_proj
    assert (module.activations is None) == (acts is None)


def test_shards(make_folder):
    folder, model = make_folder("w4a8", shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert torch.equal(open_model(folder)[0](IDS), model(IDS))


def test_config_says_what_is_not_quantized(make_folder):
    folder, _ = make_folder("meta-fp8")
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert raw["config_groups"]["group_0"]["targets"] == ["Linear"]
    ignored = set(raw["ignore"])
    assert {
        "lm_head",
        "model.layers.1.feed_forward.router",
        "model.layers.0.self_attn.q_proj",
    } <= ignored
    names = load_file(folder / "model.safetensors")
    dense = {n.removesuffix(".weight") for n, t in names.items() if n.endswith("proj.weight") and t.dtype == torch.float32}  # fmt: skip
    assert dense <= ignored
    assert {n for n in names if "weight_scale" in n}.isdisjoint(
        f"{n}.weight_scale" for n in ignored
    )


def edit(folder, change):
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    change(raw["quantization_config"], raw["quantization_config"]["config_groups"]["group_0"])
    file.write_text(json.dumps(raw))


REFUSED = {
    "only compressed-tensors folders": lambda q, g: q.update(quant_method="gptq"),
    "zero points": lambda q, g: g["weights"].update(symmetric=False),
    "kv_cache_scheme is not supported": lambda q, g: q.update(kv_cache_scheme={"num_bits": 8}),
    "strategy tensor_group": lambda q, g: g["weights"].update(strategy="tensor_group", type="float"),
    "input_activations of 8 bits, strategy tensor, dynamic False": lambda q, g: g.update(
        input_activations={"num_bits": 8, "strategy": "tensor", "dynamic": False}
    ),
    "output_activations": lambda q, g: g.update(output_activations={"num_bits": 8}),
    "format 'marlin-24' of int4_g32": lambda q, g: g.update(format="marlin-24"),
    "has no config_groups": lambda q, g: q.update(config_groups={}),
    "quantization_status is 'frozen'": lambda q, g: q.update(quantization_status="frozen"),
    r"lm_head\.weight is unexpected":
        lambda q, g: q["ignore"].remove("lm_head"),
    "is quantized in another way than": lambda q, g: q["ignore"].append(
        "model.layers.1.feed_forward.experts.2.up_proj"),
    "ignore is 7; it must be a list of names": lambda q, g: q.update(ignore=7),
    r"targets is \['Linear', 1\]; it must be": lambda q, g: g.update(targets=["Linear", 1]),
    "num_bits is 'four'; it must be": lambda q, g: g["weights"].update(num_bits="four"),
    "group_size is '32'; it must be": lambda q, g: g["weights"].update(group_size="32"),
    "with groups of 0; they must be": lambda q, g: g["weights"].update(group_size=0),
    "q_proj.weight_packed is unexpected": lambda q, g: q["ignore"].append("re:.*q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_or_broken_folders_are_refused_by_name(make_folder, words):
    folder, _ = make_folder("int4")
    edit(folder, REFUSED[words])
    with pytest.raises((ConfigError, CheckpointError), match=words):
        Folder.open(folder)


def retell(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_broken_tensors(make_folder):
    folder, _ = make_folder("int4")
    name = "model.layers.1.feed_forward.experts.2.up_proj"
    retell(folder, lambda t: t.update({f"{name}.weight_shape": torch.tensor([7, 7])}))
    with pytest.raises(CheckpointError, match=rf"{name}.weight_shape says \[7, 7\]"):
        open_model(folder)
    retell(folder, lambda t: t.update({f"{name}.weight_packed": torch.zeros(3, 3)}))
    with pytest.raises(CheckpointError, match="is stored as F32; quantization_config needs I32"):
        open_model(folder)
    retell(folder, lambda t: t.pop(f"{name}.weight_packed"))
    with pytest.raises(CheckpointError, match=r"up_proj.weight_packed is missing, which"):
        open_model(folder)


@pytest.mark.parametrize("name", ["nf4", "fp8_e5m2", "mxfp8_e5m2", "mxfp6_e3m2"])
def test_formats_without_a_layout(make_model, tmp_path, name):
    model = make_model()
    swap(model, scheme(name))
    with pytest.raises(ConfigError, match=f"no layout for {name}; remedy: int8, .*in memory alone"):
        save_model(model, model.config, tmp_path / "out", card=Card("toy"))
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_and_double_quantization(make_model, make_folder, tmp_path):
    model = make_model()
    swap(model, scheme("int4_g128"))
    with pytest.raises(
        ConfigError, match=r"groups of 128 do not divide its 96 inputs, .* --group 32"
    ):
        save_model(model, model.config, tmp_path / "out", card=Card("toy"))
    folder, _ = make_folder("int8")
    with pytest.raises(ConfigError, match="is quantized already"):
        open_model(folder, scheme=scheme("int8"))
