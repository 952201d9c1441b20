"""Peak memory of `herdling quantize` on a folder with Scout's exact layer shapes.

    python benchmarks/quantize_memory.py [--layers 2] [--vocab 8192] [--format int4_g128] [--work DIR]

Writes a random bfloat16 folder (9.1 GB with the defaults; removed at the end), quantizes it in a process of
its own that watches itself. The claim: the peak is what the imports take, one plain block, the same
quantized, one shard of the result, and float32 copies of one expert while it is rounded; never the
model. Needs 12 GB of memory and of disk.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from load_memory import Watch, alone, make, resident

SHARD_BYTES = 10**9


def quantize(folder: Path, out: Path, name: str) -> dict[str, Any]:
    from herdling.checkpoint import Folder
    from herdling.checkpoint.quantize import quantize_folder
    from herdling.quant.schemes import scheme

    source = Folder.open(folder)
    ids = torch.randint(source.config.text.vocab_size, (1, 32))
    start = time.perf_counter()
    with Watch() as watch:
        outcome = quantize_folder(source, out, scheme(name), ids, shard_bytes=SHARD_BYTES)
    return {
        "seconds": time.perf_counter() - start,
        "imports": watch.before["RssAnon"],
        "peak_anonymous": watch.peak["RssAnon"],
        "peak": resident()["VmHWM"],
        "bits": 8 * outcome.report.nbytes / sum(r.parameters for r in outcome.report.rows),
        "share": outcome.report.share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of quantizing a folder.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--format", default="int4_g128")
    parser.add_argument("--work", type=Path, help="where folders are written and removed again")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="quantize_memory.", dir=args.work))
    try:
        make(work / "model", args.layers, args.vocab)
        size = sum(file.stat().st_size for file in (work / "model").glob("*.safetensors"))
        (work / "out").mkdir()
        told = alone(quantize, work / "model", work / "out", args.format)
        written = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors"))
    finally:
        shutil.rmtree(work)
    block = size - 2 * args.vocab * 5120 * 2
    told |= {"model": size, "block": block // args.layers, "written": written, "shard": SHARD_BYTES}
    for name, value in told.items():
        text = f"{value / 1e9:.2f} GB" if isinstance(value, int) else f"{value:.3f}"
        print(f"{name:<16} {text}")
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
