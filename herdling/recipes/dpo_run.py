"""The work of `herdling dpo`: open the pairs, measure them under the reference, train.

`herdling.recipes.dpo` has the settings.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from herdling import distributed
from herdling.data.pair_loader import PairLoader
from herdling.data.preferences import PairSource, RecordPairs, open_pairs
from herdling.data.records import JsonLines
from herdling.data.spec import Opening, parse
from herdling.files import atomic_file
from herdling.infer.lm import load
from herdling.metrics import Progress
from herdling.recipes.dpo import Config
from herdling.recipes.training import Run
from herdling.rollouts.pairs import write_pairs
from herdling.tasks.preferences import makers
from herdling.tasks.registry import open_task
from herdling.train.preference import PreferenceLoss, answers, pairs


def train(config: Config, name: str = "dpo") -> nn.Module:
    """Train, save OUT/model, return the model. Stopped runs resume exactly with `resume`."""
    run = Run(config, name)
    opening = Opening(
        run.tok, config.split, config.seed, config.length, run.processor, config.encoding_errors
    )
    sources = open_pairs(config.data, opening, makers())
    if config.rollouts is not None:
        total = sum(weight for _, weight in sources)
        share = config.rollout_share
        sources.append((_own_pairs(config, config.rollouts, opening), total * share / (1 - share)))
    loader = PairLoader(
        sources,
        run.tok,
        count=config.pairs,
        batch_size=config.batch,
        length=config.length,
        without=config.without,
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    if distributed.is_main():
        shares = ", ".join(f"{of} {share:.0%}" for of, share in loader.shares().items())
        print(f"{len(loader)} pairs ({shares}), {loader.skipped} too long")
    if config.preference.needs_reference:
        loader.reference = reference(run, loader, config.out / "reference.safetensors")
    run.fit(loader, PreferenceLoss(config.preference), weight=pairs)
    return run.save(data=list(loader.shares()), note=f"{len(loader)} pairs")


def _own_pairs(config: Config, tasks: str, opening: Opening) -> PairSource:
    """The model's own answers; a run that resumes has them in OUT/rollouts.jsonl."""
    path = config.out / "rollouts.jsonl"
    side = None if opening.processor is None else opening.processor.size
    if distributed.is_main() and not (config.resume and path.exists()):
        given = write_pairs(
            load(config.model),
            [(open_task(name, opening.seed, side), weight) for name, weight in parse(tasks)],
            path,
            count=max(1, round(config.pairs * config.rollout_share)),
            tries=config.tries,
            max_tokens=config.max_tokens,
        )
        print("pairs of the model's own: " + ", ".join(f"{n} {c}" for n, c in given.items()))
    distributed.barrier()
    return RecordPairs("rollouts", JsonLines([path]), opening.tok, opening.processor)


def reference(run: Run, loader: PairLoader, path: Path) -> Tensor:
    """Log-probabilities of all answers under the untrained model, (pairs, 2), from `path` if it has them.

    The file says which pairs and which weights it was computed on, and how; one of others is written
    anew.
    """
    config = run.config
    how = f"{loader.without} {config.precision} {config.quantize} {config.qat}"
    key = f"{loader.digest} {_fingerprint(run.model)} {how}"
    found = _cached(path, key)
    if found is not None:
        return found
    model, batch_size = run.model.to(run.accelerator.device).eval(), loader.batch_size
    places = range(0, len(loader), batch_size)[distributed.rank() :: distributed.world_size()]
    mine: list[tuple[int, list[list[float]]]] = []
    progress = Progress("reference", len(places), show=distributed.is_main())
    with progress, torch.no_grad(), run.arithmetic():
        for done, first in enumerate(places):
            batch = loader.batch(range(first, min(first + batch_size, len(loader))))
            batch = {k: v.to(run.accelerator.device) for k, v in batch.items()}
            mine.append((first, answers(model, batch).log_probs.view(-1, 2).tolist()))
            progress.update(done + 1, "")
    every = sorted(part for of_rank in distributed.gather(mine) for part in of_rank)
    table = torch.tensor([pair for _, part in every for pair in part], dtype=torch.float32)
    if distributed.is_main():
        with atomic_file(path) as temporary:
            save_file({"log_probs": table}, temporary, metadata={"key": key})
    distributed.barrier()
    return table


def _cached(path: Path, key: str) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("log_probs") if file.metadata()["key"] == key else None
    except (SafetensorError, OSError, KeyError, TypeError):
        return None  # cut short or another's: computing it again costs one pass


def _fingerprint(model: nn.Module) -> str:
    """The weights as one word: their sums in float64, by name."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():  # codes of a quantized model are buffers
        digest.update(f"{name}={tensor.detach().double().sum().item()!r};".encode())
    return digest.hexdigest()
