"""The work of `herdling quantize`; `herdling.recipes.quantize` has the settings."""

from pydoc_data.topics import topics

import torch

from herdling.checkpoint.card import Card
from herdling.checkpoint.folder import Folder
from herdling.checkpoint.quantize import Outcome, check, quantize_folder
from herdling.checkpoint.save import check_target, copy_inputs
from herdling.checkpoint.source import on_hub
from herdling.data.mixture import Mixture
from herdling.data.spec import Opening, open_sources
from herdling.errors import CheckpointError, ConfigError
from herdling.files import atomic_folder, check_file, write_json
from herdling.inputs.tokenizer import Tokenizer
from herdling.metrics import Progress
from herdling.quant.schemes import scheme
from herdling.recipes.export_run import INPUTS
from herdling.recipes.import_meta_run import parse_dtype
from herdling.recipes.quantize import Config
from herdling.tasks.mixture import makers

PROBE = (4, 32)
"""Rows and tokens by which a folder is compared where nothing is calibrated."""


def run(config: Config) -> None:
    """Quantize, compare, print the coverage. ConfigError for what cannot be, CheckpointError for what
    did not come out right; nothing is kept then.
    """
    options = {} if config.group is None else {"group": config.group, "per": "group"}
    found = scheme(config.format, **options)
    check_file(config.json, "json")
    if config.all_experts and config.method == "nearest":
        raise ConfigError(
            "all_experts is about calibration, and method nearest has none; remedy: --method gptq or awq"
        )
    if config.shard_bytes < 1:
        raise ConfigError(f"shard_bytes is {config.shard_bytes}; it must be at least 1")
    check_target(config.out, None if on_hub(config.path) else config.path)
    source = Folder.open(config.path)
    targets = tuple(t.strip() for t in config.targets.split(",")) if config.targets else ()
    if not all(targets):
        raise ConfigError(
            f"targets {config.targets!r} has an empty name; remedy: --targets attention,experts"
        )
    dtype = parse_dtype(config.dtype)
    check(source, found, targets, dtype or source.dtype, config.method)
    ids = _tokens(config, source)
    card = Card.open(source.path, source.config).after(
        "quantize",
        name=config.out.resolve().name,
        data=(config.data,) if config.method != "nearest" else (),
        note=f"{config.format}, {config.method}",
    )
    with (
        atomic_folder(config.out) as temporary,
        Progress(f"quantize to {config.format}", source.config.text.num_hidden_layers + 1) as bar,
    ):
        outcome = quantize_folder(
            source, temporary, found, ids, targets=targets, method=config.method,
            every=config.all_experts, dtype=dtype,
            shard_bytes=config.shard_bytes, done=lambda what: bar.update(bar.done + 1, what),
        )  # fmt: skip
        card.save(temporary, source.config)
        copy_inputs(source.path, temporary, (*INPUTS, "generation_config.json"))
    size = sum(file.stat().st_size for file in config.out.glob("*.safetensors"))
    print(outcome.report)
    for line in _seen(outcome):
        print(line)
    print(
        f"{config.out}: {size:,} bytes, opened again with the same logits; against {config.path} on "
        f"{ids.numel():,} tokens: KL {outcome.divergence:.5f} nats, same likeliest token after "
        f"{outcome.agreement:.1%}"
    )
    if config.json is not None:
        write_json(config.json, _plain(outcome, size))


def _tokens(config: Config, source: Folder) -> torch.Tensor:
    """What goes along: (rows, length) ids."""
    if config.tokens < 1 or config.length < 2:
        raise ConfigError(
            f"tokens {config.tokens}, length {config.length}: must be 1 or more, 2 or more"
        )
    calibrated = config.method != "nearest"
    rows, length = (-(-config.tokens // config.length), config.length) if calibrated else PROBE
    try:
        tok = Tokenizer.open(source.path)
    except CheckpointError:
        if calibrated:
            raise
        generator = torch.Generator().manual_seed(config.seed)  # a folder of weights alone
        return torch.randint(source.config.text.vocab_size, PROBE, generator=generator)
    if not calibrated:  # English that every Python has
        text = "\n".join(list(topics.values())[:20])
        return torch.tensor(tok.encode(text)[: PROBE[0] * PROBE[1]]).view(PROBE)
    opening = Opening(tok, seed=config.seed, length=length)
    mixture, ids = Mixture(open_sources(config.data, opening, makers())), []
    while len(ids) < rows * length:
        ids += mixture.next()[2].tokens
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _seen(outcome: Outcome) -> list[str]:
    """Calibration tokens by expert, a line a layer, and a warning for experts without any."""
    lines = [
        f"layer {layer}: calibration tokens by expert: {' '.join(map(str, seen))}"
        for layer, seen in outcome.seen.items()
    ]
    idle = sum(count == 0 for seen in outcome.seen.values() for count in seen)
    if idle:
        lines.append(
            f"warning: {idle} experts were chosen by no calibration token; remedy: more or other "
            "--data, or --all-experts"
        )
    return lines


def _plain(outcome: Outcome, size: int) -> dict:
    return {
        "bytes": size,
        "quantized_share": outcome.report.share,
        "bits_a_parameter": 8
        * outcome.report.nbytes
        / sum(r.parameters for r in outcome.report.rows),
        "coverage": [vars(row) for row in outcome.report.rows],
        "kl": outcome.divergence,
        "agreement": outcome.agreement,
        "tokens_by_expert": outcome.seen,
    }
