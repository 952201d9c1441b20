"""What each format costs in accuracy on a trained model: KL to it on replies of held-out chats, bits per byte
on text, tasks, size.

    python benchmarks/quantized_quality.py runs/demo/model --out quality.jsonl
    python benchmarks/quantized_quality.py runs/demo/model --methods --out methods.jsonl

The second compares rounding, GPTQ and AWQ with the same format, calibrated with built-in text and tasks
of the training split. Bytes are those of codes and scales with everything else in bfloat16, as a folder
written with --dtype bfloat16 has them. One model, one seed: differences of a hundredth of a bit or of a
few items are noise.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import kl_div

from herdling.checkpoint import Folder
from herdling.checkpoint.quantize import quantize_folder
from herdling.checkpoint.save import copy_inputs
from herdling.data.embedded import DOMAINS
from herdling.data.mixture import Mixture
from herdling.data.spec import Opening, open_sources
from herdling.eval.harness import evaluate
from herdling.eval.likelihood import likelihood
from herdling.infer.lm import load
from herdling.quant.schemes import scheme
from herdling.quant.swap import Report, rows_of
from herdling.recipes.export_run import INPUTS
from herdling.tasks.mixture import makers
from herdling.tasks.registry import IMAGE_TASKS, create

FORMATS = (None, "int8", "w8a8", "fp8", "mxfp8", "mxint8", "mxfp6", "int4", "w4a8", "nf4", "mxfp4",
           "int3_g32", "int2_g32", "ternary", "meta-fp8")  # fmt: skip
CHATS = 200  # of each text task, for the KL
TASKS = ("count_shapes", "shape_colour", "languages", "cldr_names")


def bytes_in_bfloat16(lm) -> int:
    rows = rows_of(lm.model)
    return sum(row.parameters * 2 if row.format == "float32" else row.nbytes for row in rows)


@torch.inference_mode()
def predictions(lm, examples) -> list[torch.Tensor]:
    """Log-probs (S, V) of the tokens that each chat wants predicted, the replies'."""
    return [
        lm.logits([e.tokens])[0, :-1].log_softmax(-1)[torch.tensor(e.loss_mask[1:])]
        for e in examples
    ]


def divergence(original: list[torch.Tensor], lm, examples) -> float:
    """KL of the quantized model from the original, nats a token."""
    pairs = zip(original, predictions(lm, examples), strict=True)
    found = [kl_div(q, p, log_target=True, reduction="none").sum(-1) for p, q in pairs]
    return torch.cat(found).mean().item()


def measure(lm, examples, items: int) -> dict:
    start = time.perf_counter()
    scores = likelihood(lm, examples, length=256)
    bits = sum(s.bits_per_byte * s.bytes for s in scores.values())
    row = {"bits_per_byte": bits / sum(s.bytes for s in scores.values())}
    for name in TASKS if items else ():
        side = {"side": lm.processor.size} if name in IMAGE_TASKS else {}
        row[name] = evaluate(lm, create(name, seed=0, **side), items, max_tokens=24).accuracy
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--formats", help="with commas; default: all")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--texts", type=int, default=40, help="of each domain")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate with")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plain = load(args.model)
    opening = Opening(plain.tokenizer, "test", 0, 256, plain.processor)
    examples = [
        source.example(i)
        for source, _ in open_sources(",".join(DOMAINS), opening)
        for i in range(min(args.texts, source.size or args.texts))
    ]

    asked = ",".join(t for t in TASKS if t not in IMAGE_TASKS)
    chats = [
        source.example(i)
        for source, _ in open_sources(asked, opening, makers())
        for i in range(CHATS)
    ]
    original = predictions(plain, chats)

    def tell(**row) -> None:
        print(json.dumps(row), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")

    if not args.methods:
        for name in args.formats.split(",") if args.formats else FORMATS:
            lm = load(args.model, quantize=name)
            tell(format=name or "float32", bytes=bytes_in_bfloat16(lm),
                 share=Report(rows_of(lm.model)).share if name else 0,
                 chat_kl=divergence(original, lm, chats),
                 **measure(lm, examples, args.items))  # fmt: skip
        return
    source = Folder.open(args.model)
    names = ",".join((*DOMAINS, *(t for t in TASKS if t not in IMAGE_TASKS)))
    drawn = Mixture(open_sources(names, Opening(plain.tokenizer, "train", 0, 256), makers()))
    ids: list[int] = []
    while len(ids) < args.tokens:
        ids += drawn.next()[2].tokens
    rows = torch.tensor(ids[: args.tokens]).view(-1, 256)
    for name in args.formats.split(",") if args.formats else ("int4", "int3_g32", "int2_g32"):
        for method, every in (("nearest", False), ("awq", False), ("gptq", False), ("gptq", True)):
            with tempfile.TemporaryDirectory() as work:
                start = time.perf_counter()
                outcome = quantize_folder(
                    source, Path(work), scheme(name), rows, method=method, every=every,
                    shard_bytes=10**9,
                )  # fmt: skip
                took = time.perf_counter() - start
                copy_inputs(source.path, Path(work), INPUTS)
                tell(format=name, method=method, all_experts=every, kl=outcome.divergence,
                     quantize_seconds=round(took, 1),
                     fewest_seen=min(map(min, outcome.seen.values())) if outcome.seen else None,
                     **measure(load(work), examples, args.items))  # fmt: skip


if __name__ == "__main__":
    main()
