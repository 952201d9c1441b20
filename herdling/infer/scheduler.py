"""Who computes what in the next step: decoding and pieces of prompts together, within the memory.

Every running sequence that decodes gets its token in every step. The rest of a step's tokens is
shared out evenly over the prompts being read, so a long prompt neither stalls the others nor waits for
them. Memory goes by rank (priority, then order of arrival): a sequence that needs a page takes it
from those behind it, which are put back into the queue and computed again later, mostly from pages
that are still known. A request is let in when its tokens fit, and waits while another one is just
computing a prefix that it could share.
"""

import heapq
from dataclasses import dataclass

from herdling.errors import InputError
from herdling.infer.drafts import Proposal
from herdling.infer.guessing import Guessing
from herdling.infer.pages import Pages, Store
from herdling.infer.sequence import Sequence

LOOK_AHEAD = 64
"""Waiting sequences that may be passed over in a step because others compute what they need."""


@dataclass
class Piece:
    """Positions start..end of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    tokens: list[int]
    guessing: int = 0
    """Guesses that may be added to the tokens; there is memory for them."""
    guess: Proposal | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def last(self) -> bool:
        """Whether the next token can be sampled after it."""
        return self.end >= len(self.sequence.ids)

    def add(self, guess: Proposal) -> None:
        """Let the step read guessed tokens too."""
        if guess.tokens:
            self.guess = guess
            self.tokens = self.tokens + guess.tokens


class Scheduler:
    """The queue and what runs."""

    def __init__(
        self,
        store: Store,
        pages: Pages,
        max_running: int,
        step_tokens: int,
        reuse: bool,
        longest_guess: int = 0,
        guessing: Guessing | None = None,
    ) -> None:
        """`guessing` chooses for all together; without, each sequence goes by its own past."""
        self.store, self.pages = store, pages
        self.max_running, self.step_tokens, self.reuse = max_running, step_tokens, reuse
        self.longest_guess, self._guessing = longest_guess, guessing
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._queue: list[tuple[tuple[int, int], Sequence]] = []

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def sequences(self) -> list[Sequence]:
        """All, running and waiting."""
        return [*self.running, *(sequence for _, sequence in self._queue)]

    def check(self, tokens: int) -> None:
        """Raise InputError unless a sequence of so many tokens could run by itself."""
        need = self._most_pages(tokens)
        if need > self.pages.count:
            raise InputError(
                f"prompt and reply need {need * self.store.page_bytes / 2**20:.1f} MiB of cache, "
                f"{self.pages.count * self.store.page_bytes / 2**20:.1f} MiB are there: ask for "
                "fewer tokens, or give the engine more memory"
            )

    def _most_pages(self, tokens: int) -> int:
        """Pages that a sequence holds at most at once."""
        layers = self.store.layers
        tokens += self.longest_guess
        whole = -(-tokens // layers.global_tokens) if layers.has_global else 0
        most = min(tokens, (layers.chunk or 0) + self.step_tokens)
        return whole + (-(-most // layers.local_tokens) + 1 if layers.has_local else 0)

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._queue, (sequence.rank, sequence))

    def remove(self, index: int) -> Sequence | None:
        """Take a sequence out wherever it is."""
        for sequence in self.running:
            if sequence.index == index:
                self.retire(sequence)
                return sequence
        for i, (_, sequence) in enumerate(self._queue):
            if sequence.index == index:
                self._queue.pop(i)
                heapq.heapify(self._queue)
                return sequence
        return None

    def retire(self, sequence: Sequence) -> None:
        """A sequence is done: its pages are free, or kept for others."""
        self.running.remove(sequence)
        sequence.memory.release()

    def plan(self) -> list[Piece]:
        """The pieces of the next step, in the order of rank."""
        self._admit()
        self.running.sort(key=lambda sequence: sequence.rank)
        pieces: list[Piece] = []
        reading = sum(not s.decoding for s in self.running)
        left = max(self.step_tokens - (len(self.running) - reading), reading)
        wanted = self._to_guess()
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # preempted by one before it
            start = sequence.memory.computed
            count, guessing = len(sequence.ids) - start, 0
            if sequence.decoding:
                guessing = wanted.get(sequence.index, 0)
            else:
                count = min(count, max(1, left // reading))
                left, reading = left - count, reading - 1
            if self._room(sequence, start + count + guessing):
                sequence.memory.grow(start + count + guessing)
                pieces.append(Piece(sequence, start, sequence.ids[start : start + count], guessing))
        return pieces

    def _to_guess(self) -> dict[int, int]:
        """Tokens to guess for each sequence that decodes."""
        if self.longest_guess < 1 or (self._guessing and self._guessing.resting()):
            return {}
        asked = [
            (sequence, sequence.speculation, min(self.longest_guess, sequence.guessable))
            for sequence in self.running
            if sequence.speculation and sequence.decoding
        ]
        if self._guessing is None:
            return {sequence.index: min(own.wanted(), most) for sequence, own, most in asked}
        if len(asked) < len(self.running):  # a step that reads prompts is long as it is
            return {}
        counts = self._guessing.choose([(own.length, most) for _, own, most in asked])
        return {
            sequence.index: count for (sequence, _, _), count in zip(asked, counts, strict=True)
        }

    def _room(self, sequence: Sequence, end: int) -> bool:
        """Make pages available for positions below `end`, from sequences of lower rank if need be."""
        need = sequence.memory.missing(end)
        while need > self.pages.available:
            last = self.running[-1]
            if last is sequence:
                return False
            self.running.pop()
            last.memory.release()
            self.add(last)
            self.preemptions += 1
        return True

    def _admit(self) -> None:
        """Let waiting sequences in, by rank, while there is room."""
        if not self._queue:
            return
        put_off = []
        taken = sum(s.memory.missing(len(s.ids)) for s in self.running)
        soon = (
            {d for s in self.running for d in s.memory.coming(len(s.ids))} if self.reuse else set()
        )
        while self._queue and len(self.running) < self.max_running and len(put_off) < LOOK_AHEAD:
            rank, sequence = heapq.heappop(self._queue)
            if soon and sequence.memory.next_known(len(sequence.ids)) in soon:
                put_off.append((rank, sequence))
                continue
            need = min(self._most_pages(len(sequence.ids) + 1), self.pages.count)
            if self.running and need + taken > self.pages.available:
                put_off.append((rank, sequence))
                break  # nobody behind it may overtake it for ever
            sequence.begin(self.reuse)
            taken += sequence.memory.missing(len(sequence.ids))
            if self.reuse:
                soon.update(sequence.memory.coming(len(sequence.ids)))
            self.running.append(sequence)
        for entry in put_off:
            heapq.heappush(self._queue, entry)
