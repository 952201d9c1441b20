"""Beam search: the likeliest whole replies that keeping `beams` of them at a time finds.

    for reply in search(engine, request, beams=4):      # or lm.beams("Once", beams=4, max_tokens=32)
        print(reply.score, reply.ids)

Each step asks the engine for one more token of every beam with its likeliest alternatives; what beams have in
common is computed once, because prompts that begin alike share pages (the last page, 16 positions, is
computed again). The rules are those of transformers' `generate(num_beams=.., early_stopping=False)`, whose
replies these are (`tests/infer/test_beams.py`). Left out: sampling, penalties, grammars and stop strings
together with beams, groups of beams, and beams in the server, for whose dialects no client asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from herdling.errors import ConfigError, InputError
from herdling.infer.engine import Engine
from herdling.infer.request import MOST_ALTERNATIVES, FinishReason, Request
from herdling.infer.sampling import Sampling


@dataclass(frozen=True)
class Beam:
    """A reply, or the beginning of one."""

    ids: tuple[int, ...]
    """New tokens, the stop token included."""
    total: float
    """Sum of their natural log-probs."""
    score: float = 0.0
    """`total` over the length to the power of the length penalty."""
    finish_reason: FinishReason = "length"
    """`stop`: it ends with a stop token."""


def search(
    engine: Engine, request: Request, beams: int = 4, length_penalty: float = 1.0
) -> list[Beam]:
    """The best `beams` replies, the best first; prompt, `max_tokens`, stop ids, adapter, priority are the
    request's.

    A `length_penalty` above 0 favours long replies, one below 0 short ones. Not for an engine that others
    use at the same time. Raises ConfigError for numbers out of range, InputError for a request that asks
    for more than the likeliest tokens.
    """
    needed = max(2, 1 + len(request.stop_ids)) * beams
    vocabulary = engine.model.config.text.vocab_size
    if beams < 1 or min(needed, vocabulary) > MOST_ALTERNATIVES:
        raise ConfigError(
            f"{beams} beams with {len(request.stop_ids)} stop tokens need {needed} alternatives a step; "
            f"1 to {MOST_ALTERNATIVES} can be had"
        )
    if request.sampling != Sampling() or request.grammar is not None or request.stop:
        raise InputError(
            "beam search takes the likeliest tokens: no temperature, penalties, grammar or stop strings"
        )
    engine.check(request)
    longest = engine.model.config.text.max_position_embeddings - len(request.ids)
    running, finished = [Beam((), 0.0)], list[Beam]()
    for length in range(1, min(request.max_tokens, longest) + 1):
        last = length == min(request.max_tokens, longest)
        found = _continued(engine, request, running, min(needed, vocabulary))[:needed]
        running = []
        for place, beam in enumerate(found):
            stopped = beam.ids[-1] in request.stop_ids
            if stopped or last:
                if place < beams:  # the others were only there to have enough to go on with
                    score = beam.total / length**length_penalty
                    reason: FinishReason = "stop" if stopped else "length"
                    finished.append(replace(beam, score=score, finish_reason=reason))
            elif len(running) < beams:
                running.append(beam)
        finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
        best = running[0].total / length**length_penalty if running else 0.0
        if len(finished) == beams and (not running or best <= finished[-1].score):
            break
    return finished


def _continued(engine: Engine, request: Request, running: Sequence[Beam], count: int) -> list[Beam]:
    """All beams with each of their `count` likeliest next tokens, the likeliest first."""
    prompt = list(request.ids)
    asked = [
        replace(request, ids=[*prompt, *beam.ids], max_tokens=1, stop_ids=(), top_logprobs=count)
        for beam in running
    ]
    found = [
        Beam((*beam.ids, token), beam.total + logprob)
        for beam, reply in zip(running, engine.run(asked), strict=True)
        for token, logprob in reply.top[0]
    ]
    return sorted(found, key=lambda beam: -beam.total)
