"""What a step of the engine computes: hidden states of its pieces, and from them each reply's next tokens.

Where a sequence's tokens are all computed, its next one is sampled, or a guess of several is tested
against the model; both share one product with the head.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herdling.errors import Error
from herdling.infer.drafts import Drafter, Proposal
from herdling.infer.guessing import Guessing
from herdling.infer.request import Alternatives, Event, PromptToken
from herdling.infer.runner import Runner
from herdling.infer.sampler import choose, log_probs_of, top_of
from herdling.infer.scheduler import Piece, Scheduler
from herdling.infer.sequence import Sequence as Running
from herdling.infer.speculative import accept

SCORED_AT_ONCE = 256
"""Prompt positions whose logits are in memory at once."""


@dataclass
class Counts:
    """What an engine has done since it was made."""

    prompt: int = 0
    cached: int = 0
    new: int = 0
    steps: int = 0
    finished: int = 0
    drafted: int = 0
    accepted: int = 0
    load: Tensor | None = None
    """Tokens of each layer's experts (MoE layers, experts)."""

    def note(self, pieces: Sequence[Piece], routes: Tensor | None, experts: int) -> None:
        """Count a step; `routes` are the experts chosen in it, (MoE layers, tokens, k)."""
        self.steps += 1
        for piece in pieces:
            sequence = piece.sequence
            # One that was put back begins again, and its prompt is no new one.
            if not sequence.counted:
                sequence.counted = True
                self.cached += sequence.cached
                self.prompt += sequence.prompt
        if routes is not None:
            if self.load is None:
                self.load = torch.zeros(len(routes), experts, dtype=torch.int64)
            flat = routes.flatten(1).cpu()
            self.load.scatter_add_(1, flat, torch.ones_like(flat))


@dataclass
class _Test:
    """A guess that is to be tested in a step."""

    piece: Piece
    guess: Proposal
    step: slice
    """The piece's rows in the step."""
    first: int = 0
    """Its first row of logits: of the last token before the guess."""

    @property
    def rows(self) -> int:
        return len(self.guess.tokens) + 1


class Stepper:
    """Computes planned pieces with one model over one store."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        counts: Counts,
        drafter: Drafter | None = None,
        guessing: Guessing | None = None,
    ) -> None:
        self.scheduler, self.runner, self.counts = scheduler, runner, counts
        self._drafter, self._guessing = drafter, guessing

    def compute(self, pieces: Sequence[Piece]) -> list[Event]:
        """Run the pieces, and sample where a sequence's tokens are all computed."""
        hidden, routes = self.runner.run(pieces)
        self.counts.note(pieces, routes, self.runner.model.config.text.num_local_experts)
        ready: list[tuple[Piece, slice]] = []
        offset = 0
        for piece in pieces:
            rows = slice(offset, offset := offset + len(piece.tokens))
            sequence = piece.sequence
            if sequence.request.prompt_logprobs is not None and piece.start < sequence.prompt:
                self._score(piece, hidden[rows])
            if piece.last:
                ready.append((piece, rows))
            else:
                self._note_experts(piece, piece.end, rows, routes)
                sequence.memory.advance(piece.end, self.scheduler.reuse)
        rows = sum(len(piece.guess.tokens) + 1 if piece.guess else 1 for piece, _ in ready)
        with self.runner.choosing(rows):
            return self._sample(ready, hidden, routes)

    def guess(self, pieces: Sequence[Piece]) -> float:
        """Let the drafter guess on where a piece has all tokens there are; the seconds that it took."""
        asked = [
            (piece, speculation, piece.guessing)
            for piece in pieces
            if piece.guessing and (speculation := piece.sequence.speculation)
        ]
        if not self._drafter or not asked:
            return 0.0
        begun = time.perf_counter()
        proposals = self._drafter.propose(
            [(own.draft, count, piece.sequence.sampler) for piece, own, count in asked]
        )
        took = time.perf_counter() - begun
        # A draft that must first catch up takes longer, which says nothing about its guesses.
        if self._guessing and all(own.current for _, own, _ in asked):
            self._guessing.guesses.note(sum(count for _, _, count in asked) - 1, took)
        for (piece, _, _), proposal in zip(asked, proposals, strict=True):
            piece.add(proposal)
        return took

    def _note_experts(self, piece: Piece, end: int, rows: slice, routes: Tensor | None) -> None:
        """Note the experts of the piece's positions below `end`, where they are wanted."""
        if piece.sequence.request.want_experts and routes is not None:
            mine = routes[:, rows.start : rows.start + end - piece.start]
            piece.sequence.memory.routes.append(mine.transpose(0, 1).to(torch.int16).cpu())

    def _sample(
        self, ready: Sequence[tuple[Piece, slice]], hidden: Tensor, routes: Tensor | None
    ) -> list[Event]:
        """The next tokens of every sequence whose tokens are all computed."""
        events: list[Event] = []
        plain: list[tuple[Running, int]] = []
        tests: list[_Test] = []
        for piece, rows in ready:
            sequence = piece.sequence
            if piece.guess is None:
                self._note_experts(piece, piece.end, rows, routes)
                sequence.memory.advance(piece.end, self.scheduler.reuse)
            if sequence.room == 0:
                events.append(self._retire(sequence, sequence.end("length")))
            elif piece.guess is not None:
                tests.append(_Test(piece, piece.guess, rows))
            elif (problem := sequence.prepare()) is not None:
                failed = Event(sequence.index, None, 0.0, "", error=problem)
                events.append(self._retire(sequence, failed))
            else:
                plain.append((sequence, rows.stop - 1))
        # One product with the head for all: the plain ones first, then each test's rows.
        places = [row for _, row in plain]
        names = [sequence.request.adapter for sequence, _ in plain]
        for test in tests:
            test.first = len(places)
            places += range(test.step.stop - test.rows, test.step.stop)
            names += [test.piece.sequence.request.adapter] * test.rows
        if not places:
            return events
        logits = self.runner.logits(hidden[places], names)
        if plain:
            mine = logits[: len(plain)]
            masks = None
            if any(sequence.matcher for sequence, _ in plain):
                masks = [sequence.matcher and sequence.matcher.apply for sequence, _ in plain]
            tokens, logprobs = choose(mine, [sequence.sampler for sequence, _ in plain], masks)
            wanted = [sequence.request.top_logprobs for sequence, _ in plain]
            tops = top_of(mine, wanted) if any(wanted) else [[]] * len(plain)
            for i, (sequence, _) in enumerate(plain):
                events += self._take(sequence, None, [(tokens[i], logprobs[i], tops[i])])
        if tests:
            events += self._verify(tests, logits, routes)
        return events

    def _verify(
        self, tests: Sequence["_Test"], logits: Tensor, routes: Tensor | None
    ) -> list[Event]:
        """Keep what the model agrees with of each guess, and one token of its own."""
        events: list[Event] = []
        passed: list[tuple[_Test, list[int]]] = []
        kept: list[int] = []
        likeliest = logits.argmax(-1).tolist()
        for test in tests:
            sequence, rows = test.piece.sequence, slice(test.first, test.first + test.rows)
            try:
                masks = sequence.matcher and sequence.matcher.along(test.guess.tokens)
                tokens = accept(
                    logits[rows], test.guess.tokens, test.guess.q, sequence.sampler, masks,
                    likeliest[rows],
                )  # fmt: skip
            except Error as problem:
                failed = Event(sequence.index, None, 0.0, "", error=problem)
                events.append(self._retire(sequence, failed))
            else:
                passed.append((test, tokens))
                kept += range(test.first, test.first + len(tokens))
        if not passed:
            return events
        own = logits[kept]
        chosen = torch.tensor([token for _, tokens in passed for token in tokens])
        logprobs = own.log_softmax(-1).gather(1, chosen[:, None].to(own.device))[:, 0].tolist()
        wanted = [test.piece.sequence.request.top_logprobs for test, tokens in passed for _ in tokens]  # fmt: skip
        tops = top_of(own, wanted) if any(wanted) else [[]] * len(wanted)
        first = 0
        for test, tokens in passed:
            piece = test.piece
            end = piece.end - test.rows + len(tokens)
            self._note_experts(piece, end, test.step, routes)
            self.counts.drafted += len(test.guess.tokens)
            self.counts.accepted += len(tokens) - 1
            mine = slice(first, first := first + len(tokens))
            new = list(zip(tokens, logprobs[mine], tops[mine], strict=True))
            brought = self._take(piece.sequence, test.guess, new)
            if brought[-1].completion is None and brought[-1].error is None:
                piece.sequence.memory.advance(end, self.scheduler.reuse)
            events += brought
        return events

    def _take(
        self,
        sequence: Running,
        guess: Proposal | None,
        new: Sequence[tuple[int, float, Alternatives]],
    ) -> list[Event]:
        """Add tokens to a reply until it ends."""
        events = []
        for i, (token, logprob, top) in enumerate(new):
            try:
                complete = sequence.accept(token)
                event = sequence.take(token, logprob, top, complete, len(new) - i)
            except Error as problem:
                event = Event(sequence.index, None, 0.0, "", error=problem)
            self.counts.new += 1
            events.append(event)
            if event.completion is not None or event.error is not None:
                self._retire(sequence, event)
                return events
        if sequence.speculation:
            sequence.speculation.commit(guess, [token for token, _, _ in new])
        return events

    def _retire(self, sequence: Running, event: Event) -> Event:
        self.scheduler.retire(sequence)
        self.counts.finished += 1
        return event

    def _score(self, piece: Piece, hidden: Tensor) -> None:
        """Log-probs of the prompt tokens that follow the piece's positions."""
        sequence = piece.sequence
        first, end = max(piece.start, len(sequence.prompt_tokens) - 1), sequence.prompt - 1
        top = sequence.request.prompt_logprobs or 0
        for a in range(first, min(piece.end, end), SCORED_AT_ONCE):
            b = min(a + SCORED_AT_ONCE, piece.end, end)
            part = hidden[a - piece.start : b - piece.start]
            logits = self.runner.logits(part, [sequence.request.adapter])
            targets = torch.tensor(sequence.ids[a + 1 : b + 1])
            own, ids, values = log_probs_of(logits, targets, top)
            for i, token in enumerate(targets.tolist()):
                best = list(zip(ids[i].tolist(), values[i].tolist(), strict=True))
                sequence.prompt_tokens.append(PromptToken(token, own[i].item(), best))
