"""Speculation in the engine at batch 1: time with a draft and without, beside what arithmetic predicts.

    python benchmarks/speculation.py runs/demo/model --draft ngram shared runs/draft ngram+runs/draft

Each draft (`ngram`, `shared`, a model folder, or several in turn: ngram+runs/draft) answers the same
prompts as plain decoding does, request by request in turn, so that a busy machine slows all alike;
figures are medians over rounds of whole requests, prompts included. Greedy replies must be equal, or
the run ends with status 1.

Predictions are for the acceptance and the lengths that were measured, (tokens of a check by the
formula) / (g c + v(g)): *by time* with the cost c of a guess and v(g) of a check timed apart in the same
run (guesses that are never right, on random text), *by bytes* with those that the engine itself goes by.
`--batch N` decodes N of them together, as a server does: when one ends, the
next begins, and lengths vary so that they do not end together.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import herdling
from herdling.data.embedded import texts
from herdling.infer.costs import Costs, distinct_experts, expected_tokens
from herdling.infer.draft_models import ModelDraft, SharedExpertDraft
from herdling.infer.drafts import Asked, Draft, Drafter, FirstDraft, NgramDraft, OneByOne, Proposal
from herdling.infer.engine import Engine
from herdling.infer.lm import LM
from herdling.infer.request import Request
from herdling.infer.sampler import Sampler
from herdling.infer.sampling import Sampling
from herdling.model.llama import Router, TextLM, decoder_of

LONGEST = 8
CPU_TIME = False


def clock() -> float:
    return time.process_time() if CPU_TIME else time.perf_counter()


class Counted:
    """A drafter that notes how many tokens were proposed at a time."""

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.cost, self.sampled = inner, inner.cost, inner.sampled
        self.lengths: Counter[int] = Counter()

    def begin(self, ids: Sequence[int]) -> Draft:
        return self.inner.begin(ids)

    def propose(self, asked: Sequence[Asked]) -> list[Proposal]:
        found = self.inner.propose(asked)
        self.lengths.update(len(proposal.tokens) for proposal in found)
        return found


class Wrong(OneByOne):
    """Proposes so many tokens at no cost, which random weights or text make wrong."""

    cost = 0.0

    def __init__(self, count: int) -> None:
        self.count, self.nbytes = count, 0

    def begin(self, ids: Sequence[int]) -> "Wrong":
        return self

    def propose(self, asked, sampler: Sampler | None = None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if sampler is None:
            return super().propose(asked)
        return Proposal([self.count] * asked)

    def commit(self, tokens: Sequence[int]) -> None: ...


def step_times(lm: LM, prompt: Sequence[int], rounds: int) -> tuple[float, list[float]]:
    """Median seconds of a step that reads the prompt, and of those that check 0 to LONGEST guesses."""
    times: list[list[float]] = [[] for _ in range(LONGEST + 1)]
    engines, first = [], []
    for count in range(LONGEST + 1):
        engine = Engine(lm.model, lm.tokenizer, reuse=False, drafter=Wrong(count), longest_guess=LONGEST, adapt_guesses=False)  # fmt: skip
        engine._costs = Costs(0.0, (1.0,) * count + (0.5,))  # so that it always asks for all
        engine.add(Request(list(prompt), max_tokens=rounds + 8))
        began = clock()
        engine.step()
        first.append(clock() - began)
        engine.step()
        engines.append(engine)
    for _ in range(rounds):
        for count, engine in enumerate(engines):
            began = clock()
            engine.step()
            times[count].append(clock() - began)
    return statistics.median(first), [statistics.median(t) for t in times]


def guess_time(drafter: Drafter, vocabulary: int, context: int) -> float:
    """Median seconds of a guessed token, by fours, on text without repeats."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (context + 40,), generator=generator).tolist()
    draft, sampler, took = drafter.begin(ids[:context]), Sampler(Sampling()), []
    drafter.propose([(draft, 1, sampler)])
    for token in ids[context:]:
        draft.commit([token])
        began = clock()
        (proposal,) = drafter.propose([(draft, 4, sampler)])
        took.append((clock() - began) / max(1, len(proposal.tokens)))
    return statistics.median(took)


def predicted(costs: Costs, acceptance: float, lengths: Counter[int], prompts: float) -> float:
    """Speed-up for checks of these lengths, where reading the prompts took so many steps' time."""
    tokens = sum(n * expected_tokens(acceptance, g) for g, n in lengths.items())
    steps = (n * (g * costs.draft + costs.verify[g] / costs.verify[0]) for g, n in lengths.items())
    return (prompts + tokens) / (prompts + sum(steps))


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


def drafter_of(name: str, target: LM, sampled: bool) -> Drafter:
    if "+" in name:
        return FirstDraft(*(drafter_of(part, target, sampled) for part in name.split("+")))
    if name == "ngram":
        return NgramDraft()
    if name == "shared":
        return SharedExpertDraft(target.model, LONGEST, sampled)
    draft = herdling.load(name, device="cpu", dtype=next(target.model.parameters()).dtype)
    return ModelDraft(
        draft.model, draft.tokenizer, target.model, target.tokenizer, LONGEST, sampled
    )


def read_prompts(args: argparse.Namespace, lm: LM) -> list[list[int]]:
    """One prompt a line of the file, or beginnings of built-in test texts."""
    found = (
        args.prompts.read_text("utf-8").splitlines()
        if args.prompts
        else [text[:400] for text in texts("test", limit=3_000_000, domains=(args.domain,))]
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
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--domain", default="code", help="built-in text the prompts come from")
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--context", type=int, default=64, help="tokens of a prompt at most")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a reply")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--sampled", action="store_true", help="draft models draw what they guess")
    parser.add_argument("--batch", type=int, default=1, help="prompts that are decoded together")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: the folder's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; one thread")
    args = parser.parse_args()
    if args.cpu_time:
        global CPU_TIME
        CPU_TIME, args.threads = True, 1
    torch.set_num_threads(args.threads)
    lm = herdling.load(args.target, device="cpu", dtype=args.dtype)
    prompts = read_prompts(args, lm)
    drafters = {name: Counted(drafter_of(name, lm, args.sampled)) for name in args.draft}
    context, vocabulary = len(prompts[0]) + args.tokens // 2, lm.config.text.vocab_size
    first, check = step_times(lm, prompts[0], 24)
    guess = {name: guess_time(d.inner, vocabulary, context) for name, d in drafters.items()}
    print(json.dumps({"prompt ms": round(1e3 * first, 3), "step ms": [round(1e3 * t, 3) for t in check],
                      "check in steps": [round(t / check[0], 2) for t in check]}))  # fmt: skip
    measure(args, lm, drafters, prompts, first / check[0], check, guess)
    text = lm.config.text
    for tokens in (2, 4, 8):
        line = {
            "distinct experts of": tokens,
            "counted": experts_touched(decoder_of(lm.model), prompts, tokens),
            "even load": distinct_experts(text.num_local_experts, tokens, text.num_experts_per_tok),
        }
        print(json.dumps({k: round(v, 2) for k, v in line.items()}))


def measure(
    args: argparse.Namespace,
    lm: LM,
    drafters: dict[str, Counted],
    prompts: Sequence[Sequence[int]],
    first: float,
    check: Sequence[float],
    guess: dict[str, float],
) -> None:
    """Time all contenders in turn and print a line for each."""
    contenders = {"plain": None, **drafters}
    limits = {"longest_guess": LONGEST, "max_running": args.batch}
    engines = {
        name: Engine(lm.model, lm.tokenizer, reuse=False, drafter=drafter, **limits)
        for name, drafter in contenders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    sampling = Sampling(args.temperature, top_p=args.top_p)
    new, group = 0, 1 if args.batch == 1 else len(prompts)
    for _ in range(args.rounds):
        spent = dict.fromkeys(engines, 0.0)
        for at in range(0, len(prompts), group):
            replies = []
            for name, engine in engines.items():
                requests = [
                    Request(list(prompt), max_tokens=most(args, i), sampling=sampling, seed=at + i)
                    for i, prompt in enumerate(prompts[at : at + group])
                ]
                began = clock()
                replies.append([done.ids for done in engine.run(requests)])
                spent[name] += clock() - began
                if replies[-1] != replies[0] and (args.temperature == 0 or not args.sampled):
                    sys.exit(f"{name}: a reply differs from that without a draft")
            new += sum(map(len, replies[0]))
        for name, value in spent.items():
            seconds[name].append(value)
    rate = new / args.rounds / statistics.median(seconds["plain"])
    print(json.dumps({"plain tok_s": round(rate, 1), "batch": args.batch}))
    for name, drafter in drafters.items():
        stats, costs = engines[name].stats(), engines[name]._costs
        assert costs is not None
        lengths = drafter.lengths
        lengths[0] += new - stats.accepted - lengths.total()  # steps in which nobody was asked
        acceptance = explaining(stats.accepted, lengths)
        timed = Costs(guess[name] / check[0], tuple(t / check[0] for t in check))
        reading = first * args.rounds * len(prompts)
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
        line = {
            "draft": name,
            "speedup": statistics.median(ratios),
            "predicted by time": predicted(timed, acceptance, lengths, reading),
            "predicted by bytes": predicted(costs, acceptance, lengths, reading),
            "acceptance": acceptance,
            "tokens a check": new / lengths.total(),
            "guessed a check": stats.drafted / lengths.total(),
            "guess ms": 1e3 * guess[name],
            "cost of a guess": timed.draft,
            "by bytes": costs.draft,
        }
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}))


def most(args: argparse.Namespace, i: int) -> int:
    """New tokens of a reply: half as many to all, where several run together."""
    return args.tokens if args.batch == 1 else args.tokens * (8 + i * 5 % 8) // 15


def explaining(accepted: int, lengths: Counter[int]) -> float:
    """The acceptance at which checks of these lengths accept so many tokens by the formula."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        found = sum(n * (expected_tokens(middle, g) - 1) for g, n in lengths.items())
        low, high = (middle, high) if found < accepted else (low, middle)
    return high


if __name__ == "__main__":
    main()
