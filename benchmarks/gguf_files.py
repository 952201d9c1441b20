"""Do the GGUF files compute in llama.cpp what the model computes here? Asked of llama.cpp itself.

    python benchmarks/gguf_files.py MODEL --llama-cpp FOLDER     # FOLDER holds llama-server
    make gguf LLAMA_CPP=FOLDER [HERDLING_MODEL=runs/demo/model]

llama.cpp's binaries are built from the source package of llama-cpp-python (docs/export.md). In turn:

- *tokens*: the same ids for text that is hard to split; *rule*: the same for a vocabulary that merges
  all it may of that text, so that nothing but the splitting rule decides
- *template*: its rendering of the chat template, encoded, is `chat.render`'s ids
- *greedy*: 20 prompts, the file's type f32, f32 cache, no flash attention: the same tokens, as far as
  llama.cpp computes the same (`limits.exact_tokens`); and 400 tokens with its constants in both
- *types*: how many of those tokens f16, bf16, q8_0 and q4_0 keep before the first other one
- *adapter*: a random LoRA on every matrix of the decoder, applied while it runs
- *pictures*: with the projector file; our side given what llama.cpp makes of a picture (tokens around it,
  patches column by column), and how many replies would be others without seeing it

Prints one JSON object; exit status 1 where text, greedy tokens, adapter or pictures differ by more than
rounding: a token may differ only where our two likeliest are within `CLOSE` nats.
"""

import argparse
import base64
import contextlib
import io
import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import herdling
from herdling import lora
from herdling.checkpoint import Card, Folder, save_model
from herdling.data import embedded
from herdling.export.gguf import limits, text, vision, writing
from herdling.export.gguf.adapter import adapter
from herdling.infer.lm import LM
from herdling.inputs import chat, images
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.tasks import registry

CLOSE, CLOSE_PICTURES = 1e-3, 0.05
ASKED = ("count_shapes", "locate_shape", "shape_colour")
HARD = {
    "plain": "def add(a, b):\n    return a + b  # the sum\n",
    "spaces": "   three\n\n\n  two\t\ttabs \r\n end   ",
    "numbers": "1 12 123 1234 12345 3.14159 1,000,000",
    "contractions": "don't I'LL we've they'Re it's",
    "control tokens as text": "<|eot|> <|begin_of_text|> <|patch|>",
    "symbols": "!!! ???/// ...\n --- == != ::// \\n",
    "accents": "Se\u00f1or \u00e9t\u00e9 na\u00efve \u00dcber",
    "emoji": "\U0001f600\U0001f44d\U0001f3fd \u2764\ufe0f",
    "chinese": "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "cyrillic": "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "bytes": "a\x00b\x7f\ufffd\u200b",
    "camel case": "HTTPServer getURLParams aB Ab ABc",
    "accented capitals within a word": "caf\u00c9Bar \u00c9\u00c8\u00ea",
    "combining marks": "e\u0301te\u0301 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
}
KNOWN = ("accented capitals within a word", "combining marks")
"""Kinds of text that llama.cpp's llama4 rule splits otherwise; see docs/export.md."""


class Server:
    """A running llama-server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as problem:
            raise SystemExit(f"llama-server refused {path}: {problem.read().decode()}") from problem

    def greedy(self, prompt: Any, n: int) -> list[int]:
        """Ids that follow a prompt (ids, or text with pictures), whatever they are."""
        got = self.ask(
            "/completion",
            prompt=prompt,
            n_predict=n,
            temperature=0.0,
            top_k=1,
            ignore_eos=False,
            return_tokens=True,
            cache_prompt=False,
            repeat_penalty=1.0,
        )
        return got["tokens"]


@contextlib.contextmanager
def served(binaries: Path, file: Path, context: int, *more: str) -> Iterator[Server]:
    """llama-server on a file, computing in float32."""
    port = 18080 + hash(file.name) % 1000
    command = [binaries / "llama-server", "-m", file, "-c", context, "--port", port, "-t", 1, "-np", 1,
               "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-webui", "--no-warmup", "--swa-full",
               # else the file's own context, which ends where llama.cpp's constants begin to matter
               "--override-kv", f"llama4.context_length=int:{context}", *more]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(300):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=5).read()
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"llama-server ended: {log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield Server(url)
        finally:
            process.terminate()
            process.wait()


def split(tok: Tokenizer, server: Server) -> dict[str, bool]:
    """Which kinds of text get the same ids."""
    return {
        kind: server.ask("/tokenize", content=words, parse_special=False)["tokens"]
        == tok.encode(words)
        for kind, words in HARD.items()
    }


def rule(work: Path, binaries: Path) -> dict[str, bool]:
    """`split` with a tokenizer that learnt these very texts until every piece was one token."""
    tok = Tokenizer.train([*HARD.values(), *(" ".join(HARD.values()),) * 9] * 9, 2000, "compact")
    config = preset("nano", vision=False, vocab_size=len(tok))
    save_model(initialize(build(config)), config, work / "rule", tok, card=Card("rule"))
    writing.write(work / "rule.gguf", *text.model(Folder.open(work / "rule"), "f32"))
    with served(binaries, work / "rule.gguf", 512) as server:
        return split(tok, server)


def templated(lm: LM, server: Server) -> bool:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    prompt = server.ask("/apply-template", messages=messages)["prompt"]
    got = server.ask("/tokenize", content=prompt, add_special=False, parse_special=True)["tokens"]
    ids = chat.render(messages, lm.tokenizer, add_generation_prompt=True).ids
    # Where a template writes begin_of_text itself, llama-server takes it away and puts its own.
    return got == ids or [lm.tokenizer.bos, *got] == ids


def prompts(lm: LM, count: int, length: int) -> list[list[int]]:
    """Beginnings of held-out documents, as ids."""
    found = []
    for document in embedded.documents("code", "test"):
        ids = lm.tokenizer.encode(document.text)
        if len(ids) >= length:
            found.append([lm.tokenizer.bos, *ids[: length - 1]])
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} documents of {length} tokens")


def compare(
    lm: LM, server: Server, asked: Sequence[list[int]], n: int, close: float = CLOSE, **options: Any
) -> dict[str, Any]:
    """Greedy tokens there against the plain forward here, token by token while they agree."""
    equal = tokens = whole = 0
    gaps = []
    for ids in asked:
        ours = lm.generate([ids], max_tokens=n, temperature=0.0, **options)[0].ids
        theirs = server.greedy(ids, n)
        same = agreed(ours, theirs)
        equal, tokens = equal + same, tokens + len(ours)
        if same == len(ours):
            whole += 1
            continue
        with lora.of(lm.model).using([options.get("adapter")], [len(ids) + same]):
            logits = lm.model(torch.tensor([[*ids, *ours[:same]]]))[0, -1]
        top = logits.topk(2).values
        gaps.append(round(float(top[0] - top[1]), 6))
    return {"prompts": len(asked), "equal_throughout": whole, "tokens": tokens,
            "equal_tokens": equal, "gaps_where_they_part": gaps,
            "ok": all(gap < close for gap in gaps)}  # fmt: skip


def agreed(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the common beginning; the token that ends a reply may be told or not."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return i
    shorter = min(len(ours), len(theirs))
    return len(ours) if len(ours) - shorter <= 1 else shorter


def pictures(lm: LM, server: Server, n: int) -> dict[str, Any]:
    """Replies about pictures of one tile, which llama.cpp reads column by column."""
    tok, whole, tokens, equal, gaps, seen = lm.tokenizer, 0, 0, 0, [], 0
    assert lm.processor is not None
    with urllib.request.urlopen(server.url + "/props") as reply:
        marker = json.load(reply)["media_marker"]
    start, end = tok.special("<|image_start|>"), tok.special("<|image_end|>")
    around = [start, *[tok.patch] * lm.processor.tokens_per_tile, end]
    asked = [registry.create(name).item(i, "test") for name in ASKED for i in range(8)]
    rows, side = lm.model.encode, round(lm.processor.tokens_per_tile**0.5)
    columns = lambda pixels: rows(pixels).unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)  # noqa: E731
    lm.model.encode = columns  # for this comparison, which is the last
    for item in asked:
        parts = item.messages[-1]["content"]
        picture = next(part["image"] for part in parts if part["type"] == "image")
        question = next(part["text"] for part in parts if part["type"] == "text")
        picture = picture.resize((lm.processor.size, lm.processor.size))
        ids = [tok.bos, *around, *tok.encode(question)]

        def answer(picture: Image.Image, ids: list[int] = ids) -> list[int]:
            pixels = images.tile(picture, lm.processor).pixel_values
            request = lm.request(ids, max_tokens=n, temperature=0.0)
            return lm.engine.run([replace(request, tiles=pixels)])[0].ids

        ours, blind = answer(picture), answer(Image.new("RGB", picture.size))
        seen += ours != blind
        data = io.BytesIO()
        picture.save(data, "PNG")
        encoded = base64.b64encode(data.getvalue()).decode()
        theirs = server.greedy(
            {"prompt_string": marker + question, "multimodal_data": [encoded]}, n
        )
        same = agreed(ours, theirs)
        equal, tokens, whole = equal + same, tokens + len(ours), whole + (same == len(ours))
        if same < len(ours):
            row = torch.tensor([[*ids, *ours[:same]]])
            pixels = images.tile(picture, lm.processor).pixel_values
            top = lm.model(row, pixels)[0, -1].topk(2).values
            gaps.append(round(float(top[0] - top[1]), 6))
    return {"pictures": len(asked), "equal_throughout": whole, "tokens": tokens,
            "equal_tokens": equal, "gaps_where_they_part": gaps, "other_than_of_a_black_picture": seen,
            "ok": all(gap < CLOSE_PICTURES for gap in gaps)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder with llama-server")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Folder.open(options.model)
    lm = herdling.load(options.model, dtype=torch.float32)
    exact = limits.exact_tokens(lm.config.text)
    new = min(options.new, exact - 40)
    asked = prompts(lm, options.prompts, 40)
    out: dict[str, Any] = {"model": options.model, "exact_tokens": exact}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        work = Path(name)
        files = {}
        for kind in writing.TYPES:
            files[kind] = work / f"{kind}.gguf"
            writing.write(files[kind], *text.model(folder, kind))
        out["megabytes"] = {k: round(f.stat().st_size / 1e6, 2) for k, f in files.items()}
        with served(options.llama_cpp, files["f32"], 1024) as server:
            out["tokens"] = split(lm.tokenizer, server)
            out["template"] = templated(lm, server)
            out["greedy"] = compare(lm, server, asked, new)
            long = theirs_constants(lm)
            out["greedy_400_with_their_constants"] = compare(long, server, asked[:5], 400)
        out["rule"] = rule(work, options.llama_cpp)
        for kind in ("f16", "bf16", "q8_0", "q4_0"):
            with served(options.llama_cpp, files[kind], 1024) as server:
                result = compare(lm, server, asked, new)
                out[kind] = {k: result[k] for k in ("equal_throughout", "equal_tokens", "tokens")}
        out["adapter"] = adapted(lm, folder, files["f32"], work, asked, new, options.llama_cpp)
        if lm.config.vision is not None:
            writing.write(work / "mmproj.gguf", *vision.projector(folder))
            more = ("--mmproj", work / "mmproj.gguf")
            with served(options.llama_cpp, files["f32"], 1024, *more) as server:
                out["pictures"] = pictures(lm, server, 32)
    ok = all(out["tokens"].values())
    ok = ok and all(same for kind, same in out["rule"].items() if kind not in KNOWN)
    ok = ok and out["template"] and all(part["ok"] for part in out.values() if isinstance(part, dict) and "ok" in part)  # fmt: skip
    print(json.dumps(out, indent=2))
    return 0 if ok else 1


def theirs_constants(lm: LM) -> LM:
    """The same weights with llama.cpp's chunk and temperature floor."""
    fixed = replace(lm.config.text, attention_chunk_size=limits.CHUNK, floor_scale=limits.FLOOR)
    config = replace(lm.config, text=fixed)
    model = build(config)
    model.load_state_dict(lm.model.state_dict())
    return LM(model, lm.tokenizer, lm.processor)


def adapted(
    lm: LM, folder: Folder, file: Path, work: Path, asked: list[list[int]], n: int, binaries: Path
) -> dict[str, Any]:
    kinds = ("attention", "shared", "experts", "router", "head")
    lora.attach(lm.model, lora.LoraConfig(r=4, alpha=8, targets=kinds), "random", seed=0)
    generator = torch.Generator().manual_seed(0)
    for _, own in lora.of(lm.model).factors("random").values():
        own.B.data.copy_(0.05 * torch.randn(own.B.shape, generator=generator))
    lora.save(lm.model, work / "adapter", "random")
    writing.write(work / "adapter.gguf", *adapter(work / "adapter", folder))
    with served(binaries, file, 1024, "--lora", work / "adapter.gguf") as server:
        out = compare(lm, server, asked, n, adapter="random")
    with served(binaries, file, 1024) as server:  # else the check could not fail
        plain = compare(lm, server, asked, n, adapter="random")
    lora.of(lm.model).remove("random")
    return {**out, "equal_tokens_without_it": plain["equal_tokens"]}


if __name__ == "__main__":
    raise SystemExit(main())
