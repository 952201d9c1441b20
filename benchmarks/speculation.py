"""Speculation at batch 1: tokens a second with and without, beside what the arithmetic predicts.

    python benchmarks/speculation.py runs/demo/model --draft ngram shared runs/draft --drafted 0 3

Each draft (`ngram`, `shared`, a model folder, or several in turn: ngram+runs/draft) and length (0:
adaptive) decodes the same prompts, in turn with plain decoding, so that a busy machine slows all alike;
figures are medians over rounds. They are of a plain loop over a cached model, where lengths can be
fixed and decoding is timed alone; *in the engine* is the same for whole requests through `Engine`, one
at a time, with its own choice of length.
Predictions are for the acceptance that was measured: *by time* from the times of a draft's step and
of the target's passes, measured in the same run; *by bytes* from the shapes alone, which a machine
follows as far as it is bound by memory. Greedy replies must be equal or the run ends with status 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import herdling
from herdling.data.embedded import texts
from herdling.infer.costs import Costs, distinct_experts, expected_tokens, predict
from herdling.infer.draft_models import ModelDraft, SharedExpertDraft
from herdling.infer.drafts import Drafter, FirstDraft, NgramDraft
from herdling.infer.engine import Engine
from herdling.infer.lm import LM
from herdling.infer.request import Request
from herdling.infer.rewind import RewindCache
from herdling.infer.sampler import Sampler, Sampling
from herdling.infer.speculative import DraftLength, accept
from herdling.model.llama import Router, TextLM, decoder_of

LONGEST = 8
CPU_TIME = False


def clock() -> float:
    return time.process_time() if CPU_TIME else time.perf_counter()


@dataclass
class Tally:
    """What one pass over the prompts brought."""

    seconds: float = 0.0
    tokens: int = 0
    accepted: int = 0
    tests: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Calls by the number of drafted tokens."""

    @property
    def calls(self) -> int:
        return self.lengths.total()

    @property
    def acceptance(self) -> float:
        return self.accepted / max(1, self.tests)

    def formula(self) -> float:
        """Tokens that so many calls of these lengths bring at this acceptance."""
        return sum(n * expected_tokens(self.acceptance, g) for g, n in self.lengths.items())

    def predicted(self, costs: Costs) -> float:
        """Speed-up by the formula and these costs."""
        time = sum(n * (g * costs.draft + costs.verify[g]) for g, n in self.lengths.items())
        return self.formula() / time


class Length(DraftLength):
    """Adaptive, or `fixed` where that is not 0."""

    def __init__(self, costs: Costs, fixed: int) -> None:
        super().__init__(costs)
        self.fixed = fixed

    def choose(self) -> int:
        return self.fixed or super().choose()


@torch.inference_mode()
def decode(
    target: TextLM,
    drafter: Drafter | None,
    prompt: Sequence[int],
    sampler: Sampler,
    new: int,
    length: Length,
    tally: Tally,
) -> list[int]:
    """The loop of draft, verification and acceptance on a plain cached model; times decoding alone."""
    cache = RewindCache(target.config.text, LONGEST + 1)
    sampler.see(prompt)
    head = torch.tensor([prompt])
    logits = target(head, cache=cache, readout=lambda h, lm_head: lm_head(h[:, -1:]).float())[0]
    ids = [*prompt, *accept(logits, [], None, sampler)]
    draft = drafter.begin(ids) if drafter else None
    if draft is not None:
        draft.propose(1, sampler if sampler.sampling.temperature == 0 else Sampler(Sampling()))
    began, end = clock(), len(prompt) + new
    while len(ids) < end:
        tokens, q = [], None
        count = min(length.choose(), end - len(ids) - 1)
        if draft is not None and count:
            guess = draft.propose(count, sampler)
            tokens, q = guess.tokens, guess.q
        logits = target(torch.tensor([[ids[-1], *tokens]]), cache=cache)[0]
        got = accept(logits, tokens, q, sampler)
        if draft is not None:
            draft.commit(got)
        ids += got
        cache.rewind(len(ids) - 1)
        length.record(len(tokens), len(got) - 1)
        tally.lengths[len(tokens)] += 1
        tally.accepted += len(got) - 1
        tally.tests += min(len(got), len(tokens))
    tally.seconds += clock() - began
    tally.tokens += new - 1
    return ids[len(prompt) :]


@torch.inference_mode()
def pass_times(model: TextLM, context: int, most: int, rounds: int = 15) -> list[float]:
    """Median seconds of a pass over 1 to `most` new tokens behind `context`, timed in turn."""
    cache, vocabulary = RewindCache(model.config.text, LONGEST + 1), model.config.text.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, context + most), generator=generator)
    model(ids[:, :context], cache=cache)
    times: list[list[float]] = [[] for _ in range(most)]
    for _ in range(rounds):
        for n in range(1, most + 1):
            began = clock()
            model(ids[:, context : context + n], cache=cache)
            times[n - 1].append(clock() - began)
            cache.rewind(context)
    return [statistics.median(t) for t in times]


@torch.inference_mode()
def measured_costs(target: TextLM, drafter: Drafter, context: int) -> Costs:
    """Costs by the clock; drafting includes what it takes in Python."""
    verify = pass_times(target, context, LONGEST + 1)
    # Text without repeats: prompt lookup has no guess, so that of several drafts the model is timed.
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        target.config.text.vocab_size, (context + 15,), generator=generator
    ).tolist()
    draft, sampler = drafter.begin(ids[:context]), Sampler(Sampling())
    draft.propose(1, sampler)
    times = []
    for token in ids[context:]:
        draft.commit([token])
        began = clock()
        proposed = len(draft.propose(4, sampler).tokens)
        times.append((clock() - began) / max(1, proposed))
    return Costs(statistics.median(times) / verify[0], tuple(t / verify[0] for t in verify))


@torch.inference_mode()
def experts_touched(target: TextLM, replies: Sequence[Sequence[int]], tokens: int) -> float:
    """Distinct experts a layer in runs of `tokens` neighbours of the replies, counted."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: seen.append(out[0]))
        for module in target.modules()
        if isinstance(module, Router)
    ]
    for reply in replies:
        target(torch.tensor([reply]))
    for hook in hooks:
        hook.remove()
    counts = [
        len(chosen[i : i + tokens].unique())
        for chosen in seen
        for i in range(0, len(chosen) - tokens + 1, tokens)
    ]
    return statistics.mean(counts) if counts else 0.0


def drafter_of(name: str, target: LM) -> Drafter:
    if "+" in name:
        return FirstDraft(*(drafter_of(part, target) for part in name.split("+")))
    if name == "ngram":
        return NgramDraft()
    if name == "shared":
        return SharedExpertDraft(target.model, LONGEST)
    draft = herdling.load(name, device="cpu")
    return ModelDraft(draft.model, draft.tokenizer, target.model, target.tokenizer, LONGEST)


def read_prompts(args: argparse.Namespace, lm: LM) -> list[list[int]]:
    """One prompt a line of the file, or beginnings of built-in test texts."""
    found = (
        args.prompts.read_text("utf-8").splitlines()
        if args.prompts
        else [text[:400] for text in texts("test", limit=3_000_000)]
    )
    found = [text for text in found if text.strip()]
    chosen = found[:: max(1, len(found) // args.count)][: args.count]
    return [[lm.tokenizer.bos, *lm.tokenizer.encode(text)[: args.context]] for text in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", nargs="+", default=["ngram"])
    parser.add_argument("--drafted", type=int, nargs="+", default=[0], help="0: adaptive")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--context", type=int, default=64, help="tokens of a prompt at most")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a reply")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, for a busy machine; one thread"
    )
    args = parser.parse_args()
    if args.cpu_time:
        global CPU_TIME
        CPU_TIME, args.threads = True, 1
    if not all(0 <= g <= LONGEST for g in args.drafted):
        parser.error(f"--drafted is {args.drafted}; it must be 0 to {LONGEST}")
    torch.set_num_threads(args.threads)
    lm = herdling.load(args.target, device="cpu")
    target, prompts = decoder_of(lm.model), read_prompts(args, lm)
    context, width = len(prompts[0]) + args.tokens // 2, target.lm_head.weight.element_size()
    drafters = {name: drafter_of(name, lm) for name in args.draft}
    costs = {name: measured_costs(target, d, context) for name, d in drafters.items()}
    found = measure(args, target, drafters, costs, prompts)
    whole = measure_engine(args, lm, drafters, prompts)
    plain = found.pop(("plain", 0))
    rate = statistics.median(t.tokens / t.seconds for t in plain)
    print(json.dumps({"plain tok_s": round(rate, 1)}))
    for (name, g), tallies in found.items():
        tally = tallies[0]
        ratios = [a.seconds / b.seconds for a, b in zip(plain, tallies, strict=True)]
        by_bytes = predict(lm.config, drafters[name].cost, LONGEST, width=width, position=context)
        line = {
            "draft": name,
            "drafted": g or "adaptive",
            "speedup in the engine": whole[name],
            "speedup": statistics.median(ratios),
            "predicted by time": tally.predicted(costs[name]),
            "predicted by bytes": tally.predicted(by_bytes),
            "acceptance": tally.acceptance,
            "tokens a call": tally.tokens / tally.calls,
            "by the formula": tally.formula() / tally.calls,
            "draft cost by time": costs[name].draft,
            "by bytes": by_bytes.draft,
        }
        if g:
            del line["speedup in the engine"]
            line["verification by time"] = costs[name].verify[g]
            line["verification by bytes"] = by_bytes.verify[g]
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}))
    text, sample = lm.config.text, prompts[: args.count]
    for tokens in (2, 4, 8):
        line = {
            "distinct experts of": tokens,
            "counted": experts_touched(target, sample, tokens),
            "even load": distinct_experts(text.num_local_experts, tokens, text.num_experts_per_tok),
        }
        print(json.dumps({k: round(v, 2) for k, v in line.items()}))


def measure(
    args: argparse.Namespace,
    target: TextLM,
    drafters: dict[str, Drafter],
    costs: dict[str, Costs],
    prompts: Sequence[Sequence[int]],
) -> dict[tuple[str, int], list[Tally]]:
    """A tally for each contender and round. All decode a prompt in turn before the next prompt."""
    contenders = [("plain", 0), *((name, g) for name in drafters for g in args.drafted)]
    found: dict[tuple[str, int], list[Tally]] = {c: [] for c in contenders}
    for _ in range(args.rounds):
        for tallies in found.values():
            tallies.append(Tally())
        for i, prompt in enumerate(prompts):
            want: list[int] = []
            for (name, g), tallies in found.items():
                sampler = Sampler(Sampling(args.temperature, top_p=args.top_p), i)
                length = Length(costs.get(name, Costs(0.0, (1.0,))), g)
                drafter = drafters.get(name)
                got = decode(target, drafter, prompt, sampler, args.tokens, length, tallies[-1])
                want = want or got
                if got != want and (args.temperature == 0 or name == "ngram"):
                    sys.exit(f"{name}: a reply differs from that of plain decoding")
    return found


def measure_engine(
    args: argparse.Namespace,
    lm: LM,
    drafters: dict[str, Drafter],
    prompts: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Median over rounds of the time without a draft over that with it."""
    contenders = {"plain": None, **drafters}
    engines = {
        name: Engine(lm.model, lm.tokenizer, reuse=False, drafter=drafter, longest_guess=LONGEST)
        for name, drafter in contenders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        spent = dict.fromkeys(engines, 0.0)
        for i, prompt in enumerate(prompts):
            replies = []
            for name, engine in engines.items():
                sampling = Sampling(args.temperature, top_p=args.top_p)
                request = Request(prompt, max_tokens=args.tokens, sampling=sampling, seed=i)
                began = clock()
                replies.append(engine.run([request])[0].ids)
                spent[name] += clock() - began
                if replies[-1] != replies[0] and (args.temperature == 0 or name == "ngram"):
                    sys.exit(f"{name}: the engine's reply differs from that without a draft")
        for name, value in spent.items():
            seconds[name].append(value)
    plain = seconds["plain"]
    return {
        name: statistics.median(a / b for a, b in zip(plain, times, strict=True))
        for name, times in seconds.items()
    }


if __name__ == "__main__":
    main()
