"""Distils a draft five times smaller than its target, on text that the target itself wrote.

    python benchmarks/distilled_draft.py runs/demo/model runs/draft [--steps 1500]    # some 6 minutes
    python benchmarks/speculation.py runs/demo/model --draft ngram runs/draft

One dense layer that starts with the target's embedding, head, last norm and first attention. It learns
the target's distribution (its likeliest 48 tokens) on continuations of training documents, half greedy
and half sampled at 0.7. Prints how often the two agree on held-out text of the target.
"""

import argparse
import json
import random
import time
from dataclasses import replace

import torch

import herdling
from herdling.data.embedded import texts
from herdling.infer.lm import LM
from herdling.model.config import ModelConfig
from herdling.model.init import initialize
from herdling.model.llama import TextLM, build, decoder_of

PROMPT, LENGTH, BATCH, TOP = 24, 128, 16, 48


def written_by(lm: LM, count: int) -> torch.Tensor:
    """(count, LENGTH) tokens: beginnings of training documents and how the target goes on."""
    documents = list(texts("train", limit=3_000_000))
    random.Random(0).shuffle(documents)
    tok = lm.tokenizer
    prompts = [[tok.bos, *tok.encode(d[:200])[: PROMPT - 1]] for d in documents]
    prompts = [p for p in prompts if len(p) == PROMPT][:count]
    rows: list[list[int]] = []
    for temperature, part in ((0.0, prompts[::2]), (0.7, prompts[1::2])):
        replies = lm.generate(part, seeds=range(len(part)), max_tokens=LENGTH - PROMPT,
                              temperature=temperature, stop_ids=())  # fmt: skip
        rows += [p + reply.ids for p, reply in zip(part, replies, strict=True)]
    return torch.tensor(rows)


def smaller(target: TextLM) -> TextLM:
    text = replace(
        target.config.text, num_hidden_layers=1, moe_layers=(), no_rope_layers=(1,),
        intermediate_size_mlp=target.config.text.hidden_size,
    )  # fmt: skip
    draft = initialize(build(ModelConfig(text)), seed=0)
    assert isinstance(draft, TextLM)
    ours, theirs = draft.model, target.model
    ours.layers[0].self_attn.load_state_dict(theirs.layers[0].self_attn.state_dict())
    for name in ("embed_tokens", "norm"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    draft.lm_head.load_state_dict(target.lm_head.state_dict())
    return draft


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=3e-3)
    args = parser.parse_args()
    start = time.time()
    lm = herdling.load(args.target, dtype="float32")
    target = decoder_of(lm.model)
    draft = smaller(target)
    count = [sum(p.numel() for p in m.parameters()) for m in (target, draft)]
    print(
        json.dumps(
            {"target": count[0], "draft": count[1], "smaller": round(count[0] / count[1], 1)}
        )
    )
    ids = written_by(lm, args.rows)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(9))]
    with torch.inference_mode():
        best = [target(part).softmax(-1).topk(TOP) for part in ids.split(32)]
    probs, places = (
        torch.cat([getattr(b, n) for b in best]).clone() for n in ("values", "indices")
    )
    print(json.dumps({"rows": len(ids), "seconds": round(time.time() - start)}), flush=True)
    held, learn = slice(0, 64), torch.arange(64, len(ids))
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(args.steps):
        rows = learn[torch.randint(len(learn), (BATCH,), generator=generator)]
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 20) * (1 - step / args.steps)
        logprobs = draft(ids[rows]).log_softmax(-1)
        loss = -(probs[rows] * logprobs.gather(-1, places[rows])).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        p, q = (m(ids[held])[:, PROMPT:].softmax(-1) for m in (target, draft))
    agree = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    overlap = torch.minimum(p, q).sum(-1).mean().item()
    herdling.save(LM(draft.eval(), lm.tokenizer), args.out)
    print(json.dumps({"steps": args.steps, "agree": round(agree, 3), "overlap": round(overlap, 3)}))


if __name__ == "__main__":
    main()
