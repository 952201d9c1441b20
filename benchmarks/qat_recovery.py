"""How much of what rounding loses comes back when the model is trained with it, on a toy.

    python benchmarks/qat_recovery.py run [--seeds 3] [--steps 1000] [--more 300] [--out FILE.jsonl]
    python benchmarks/qat_recovery.py experts [--seeds 3] ...
    python benchmarks/qat_recovery.py table FILE.jsonl...

Data, batches and rates of `low_precision_training.py`; the model has Scout's proportions: 16 experts as
wide as the shared one, attention half as large as an expert, so 92 % of what is rounded are routed
experts. Weights in groups of 32, activations int8 a token. A
float model is trained, then trained further: in float (the reference, so that more training is no
excuse), rounded to 4, 3 and 2 bits, and rounded with the routed experts left out. All are judged with
every matrix of the blocks rounded, experts included:

    recovered = (float, then rounded - trained with rounding) / (float, then rounded - float)

Then an adapter is trained on the frozen 2-bit model, beside an adapter on the float model that is
rounded below it; the hash of the codes says that they stayed. `bytes` are those of the blocks' codes and
scales over bfloat16's.

`experts`: the same question where only the routed experts have 2 or 3 bits and all else has 8, as in
published recipes (gpt-oss in MXFP4, Meta's FP8 and int4 Scout round little but experts).
"""

import argparse
import copy
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from low_precision_training import held_out, model_of, text, train
from torch import Tensor

from herdling import lora
from herdling.lora import LoraConfig
from herdling.model.llama import TextLM
from herdling.quant import qat
from herdling.quant.modules import Matrix
from herdling.quant.schemes import Scheme, scheme
from herdling.quant.swap import swap

BITS = (4, 3, 2)
OTHERS = ("attention", "shared")
SHAPE = dict(num_local_experts=16, num_attention_heads=2, num_key_value_heads=1)
LORA = LoraConfig(r=8, alpha=16, targets=("attention", "shared", "experts"))


def scheme_of(bits: int) -> Scheme:
    return replace(scheme(f"int{bits}_g32"), activations=scheme("w8a8").activations)


def rounded(model: TextLM, bits: int) -> TextLM:
    made = copy.deepcopy(model)
    swap(made, scheme_of(bits))
    return made


def codes(model: TextLM) -> str:
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, Matrix):
            digest.update(module.stored().numpy().tobytes())
            digest.update(module.scales.float().numpy().tobytes())
    return digest.hexdigest()


def work(
    seed: int, args: argparse.Namespace, data: Tensor, test: Tensor
) -> Iterator[dict[str, Any]]:
    base = model_of(seed, **SHAPE)
    train(base, data, seed, args.steps)

    def further(model: TextLM, steps: int = args.more, rate: float = 1e-3) -> TextLM:
        train(model, data, seed + 1000, steps, rate=rate)
        return model

    plain = further(copy.deepcopy(base))
    reference = held_out(plain, test)
    yield {"way": "float", "loss": reference}
    for bits in BITS:
        after = held_out(rounded(plain, bits), test)
        yield {"way": f"{bits} bits after training", "loss": after}
        for name, targets in (("", ()), (", experts left out", OTHERS)):
            if name and bits == 4:
                continue
            model = copy.deepcopy(base)
            qat.prepare(model, scheme_of(bits), targets)
            further(model)
            qat.remove(model)
            loss = held_out(rounded(model, bits), test)
            share = (after - loss) / (after - reference)
            yield {"way": f"{bits} bits in training{name}", "loss": loss, "recovered": share}
            if name or bits == 3:
                continue
            frozen = rounded(model, bits)
            matrices = [m for m in frozen.modules() if isinstance(m, Matrix)]
            size = sum(m.nbytes for m in matrices) / sum(2 * m.shape.numel() for m in matrices)
            before = codes(frozen)
            lora.attach(frozen, LORA, seed=seed)
            further(frozen, args.more // 2, 2e-3)
            yield {"way": f"{bits} bits in training, then an adapter", "loss": held_out(frozen, test),
                   "codes_unchanged": codes(frozen) == before, "bytes": size}  # fmt: skip
    direct = rounded(plain, 2)
    lora.attach(direct, LORA, seed=seed)
    further(direct, args.more // 2, 2e-3)
    yield {"way": "2 bits after training, then an adapter", "loss": held_out(direct, test)}


def experts(
    seed: int, args: argparse.Namespace, data: Tensor, test: Tensor
) -> Iterator[dict[str, Any]]:
    base = model_of(seed, **SHAPE)
    train(base, data, seed, args.steps)
    eight = replace(scheme("w8a8"), kinds=OTHERS)

    def further(few: Scheme | None, rest: Scheme | None) -> TextLM:
        model = copy.deepcopy(base)
        for own in (few, rest):
            if own is not None:
                qat.prepare(model, own)
        train(model, data, seed + 1000, args.more, rate=1e-3)
        qat.remove(model)
        return model

    plain = further(None, None)
    reference = held_out(plain, test)
    yield {"way": "float", "loss": reference}
    for bits in (3, 2):
        few = replace(scheme_of(bits), kinds=("experts",))

        def judged(model: TextLM, few: Scheme = few) -> float:
            made = copy.deepcopy(model)
            swap(made, few)
            swap(made, eight)
            return held_out(made, test)

        after = judged(plain)
        yield {"way": f"experts {bits} bits, after training", "loss": after}
        for name, model in (
            ("in training", further(few, eight)),
            ("in training, experts left out", further(None, eight)),
        ):
            loss = judged(model)
            share = (after - loss) / (after - reference)
            yield {"way": f"experts {bits} bits, {name}", "loss": loss, "recovered": share}


WORK = {"run": work, "experts": experts}


def table(paths: list[Path]) -> str:
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    ways: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        ways.setdefault(line["way"], []).append(line)
    out = ["| way | loss | recovered, by seed |", "| --- | --: | --- |"]
    for way, own in ways.items():
        own.sort(key=lambda line: line["seed"])
        shares = ", ".join(f"{line['recovered']:.0%}" for line in own if "recovered" in line)
        out.append(f"| {way} | {statistics.mean(line['loss'] for line in own):.4f} | {shares} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("work", choices=[*WORK, "table"])
    parser.add_argument("files", type=Path, nargs="*", help="of `table`: what --out wrote")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, nargs="*", help="these seeds only")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--more", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.work == "table":
        print(table(args.files))
        return
    data, test = text("train", 2_000_000), text("test", 200_000)
    for seed in args.seed if args.seed else range(args.seeds):
        started = time.process_time()
        for result in WORK[args.work](seed, args, data, test):
            seconds = round(time.process_time() - started, 1)
            line = json.dumps(result | {"seed": seed, "cpu_seconds": seconds})
            print(line, flush=True)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
