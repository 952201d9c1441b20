"""A request under way: its tokens, how far they are computed, where they lie, and its reply so far."""

import math
import time
from bisect import bisect_left
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from herdling.errors import Error
from herdling.infer.costs import Costs
from herdling.infer.drafts import Drafter, Proposal
from herdling.infer.pages import Pages, Store, Track
from herdling.infer.prefix import Chain
from herdling.infer.request import (
    Alternatives,
    Completion,
    Event,
    FinishReason,
    PromptToken,
    Request,
    Timings,
)
from herdling.infer.sampler import Sampler
from herdling.infer.speculative import DraftLength
from herdling.infer.stopping import StoppingText
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import ModelConfig

if TYPE_CHECKING:
    from herdling.infer.grammar import Matcher


class Memory:
    """Where a sequence's keys and values lie, and how far they go."""

    def __init__(self, store: Store, pages: Pages, chain: Chain) -> None:
        layers = store.layers
        self._pages, self._chain = pages, chain
        self._page_bytes = store.page_bytes
        self._chunk = layers.chunk
        self.whole = Track(layers.global_tokens, 1) if layers.has_global else None
        self.local = Track(layers.local_tokens, layers.share) if layers.has_local else None
        self.computed = 0
        """Positions whose keys and values are there."""
        self.routes: list[Tensor] = []
        """Experts (n, MoE layers, k) int16 of those positions, for a request that wants them."""
        self._named = [0, 0]

    def chunk_start(self, position: int) -> int:
        return position // self._chunk * self._chunk if self._chunk else 0

    @property
    def nbytes(self) -> int:
        """Of the pages it holds, shared ones too."""
        held = sum(len(track.pages) for track in (self.whole, self.local) if track)
        return held * self._page_bytes

    def missing(self, end: int) -> int:
        """Pages to take before positions up to `end` can be written."""
        return sum(track.missing(end) for track in (self.whole, self.local) if track)

    def grow(self, end: int) -> None:
        """Take those pages; the caller has seen that they are available."""
        for track in (self.whole, self.local):
            while track and track.missing(end):
                track.add(self._pages.take(local=track is self.local))

    def reuse(self, most: int, routes: bool = False) -> int:
        """Hold the pages of the longest prefix that is known, at most `most` tokens; its length.

        A local layer needs only the pages of the chunk in which the prefix ends. With `routes` the
        prefix goes no further than its experts are known, which are taken along.
        """
        step, kind = self._step()
        found: list[int] = []
        noted: list[Tensor] = []
        while routes and (own := self._routes_at(kind, (len(noted) + 1) * step, most)) is not None:
            noted.append(own)
        most = len(noted) * step if routes else most
        while self.whole and (len(found) + 1) * step <= most:
            page = self._pages.find(b"g" + self._chain.at((len(found) + 1) * step))
            if page is None:
                break
            found.append(page)
        count = len(found) if self.whole else most // step
        local: list[int] | None = None
        while count and (local := self._local_pages(count * step)) is None:
            count -= 1
        end = count * step
        for track, pages, first in ((self.whole, found[:count], 0),
                                    (self.local, local or [], self.chunk_start(end))):  # fmt: skip
            if track:
                track.first = first
                for page in pages:
                    self._pages.hold(page)
                    track.add(page)
        self.computed = end
        self._named = [end, end]
        self.routes = noted[:count]
        return end

    def _step(self) -> tuple[int, bytes]:
        """How long a piece of a prefix is, and the kind of page whose digest it has."""
        if self.whole:
            return self.whole.tokens, b"g"
        assert self.local is not None
        return self.local.tokens, b"l"

    def _routes_at(self, kind: bytes, end: int, most: int) -> Tensor | None:
        return self._pages.noted(kind + self._chain.at(end)) if end <= most else None

    def _local_pages(self, end: int) -> list[int] | None:
        """Pages of the chunk that `end` stands in, or None if one is not there."""
        if self.local is None:
            return []
        step = self.local.tokens
        places = range(self.chunk_start(end) + step, end + 1, step)
        pages = [self._pages.find(b"l" + self._chain.at(place)) for place in places]
        return None if None in pages else pages  # type: ignore[return-value]

    def coming(self, length: int) -> list[bytes]:
        """Names of the global pages that computing `length` tokens will yet fill."""
        if self.whole is None:
            return []
        step = self.whole.tokens
        first = self.computed // step * step
        return [self._chain.at(place) for place in range(first + step, length + 1, step)]

    def next_known(self, length: int) -> bytes | None:
        """The name of the first global page that nobody holds yet, if `length` tokens reach it."""
        if self.whole is None:
            return None
        step = self.whole.tokens
        for place in range(step, length, step):
            if self._pages.find(b"g" + self._chain.at(place)) is None:
                return self._chain.at(place)
        return None

    def advance(self, computed: int, share: bool) -> None:
        """Positions below `computed` are there now; chunks that are over are given back."""
        self.computed = computed
        if share:
            for kind, track in enumerate((self.whole, self.local)):
                while track and self._named[kind] + track.tokens <= computed:
                    at = self._named[kind]
                    self._named[kind] = at = at + track.tokens
                    page = track.pages[(at - track.first) // track.tokens - 1]
                    digest = (b"g", b"l")[kind] + self._chain.at(at)
                    self._pages.name(page, digest)
                    if self.routes:
                        self.routes = [torch.cat(self.routes)]
                        self._pages.note(digest, self.routes[0][at - track.tokens : at])
        if self.local:
            self._pages.release(self.local.drop_before(self.chunk_start(computed)), local=True)

    def release(self) -> None:
        """Give everything back."""
        for track in (self.whole, self.local):
            if track:
                self._pages.release(track.clear(), local=track is self.local)
        self.computed = 0
        self._named = [0, 0]


class Sequence:
    """One request between `add` and its last event."""

    def __init__(
        self,
        index: int,
        request: Request,
        config: ModelConfig,
        tokenizer: Tokenizer,
        store: Store,
        pages: Pages,
        adapter: str | None = None,
    ) -> None:
        """`adapter` stands for the one that the request's name means now (`Adapters.key`)."""
        self.index, self.request, self.adapter = index, request, adapter
        self.ids = list(request.ids)
        """Prompt and reply."""
        self.prompt = len(self.ids)
        longest = config.text.max_position_embeddings
        self.room = min(request.max_tokens, longest - self.prompt)
        """New tokens that it may have."""
        self.images = Images(request, config)
        chain = Chain(
            self.ids,
            store.layers.local_tokens,
            adapter,
            request.tiles,
            config.image_token_index,
            self.images.a_tile,
        )
        self.memory = Memory(store, pages, chain)
        self.sampler = Sampler(request.sampling, request.seed, request.stop_ids)
        self.sampler.see(request.ids)
        self.matcher: Matcher | None = None
        """What the grammar allows next."""
        self.speculation: Speculation | None = None
        self.cached = 0
        """Prompt tokens that were there when it began."""
        self.counted = False
        """Whether its prompt is in the engine's counts."""
        self.prompt_tokens: list[PromptToken | None] = [None]
        self._text = StoppingText(tokenizer, request.stop)
        self._pieces: list[str] = []
        self._logprobs: list[float] = []
        self._top: list[Alternatives] = []
        self._times = [time.perf_counter()]  # added, begun, first token

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is served first."""
        return self.request.priority, self.index

    @property
    def decoding(self) -> bool:
        """Whether all but the newest token are computed."""
        return self.memory.computed == len(self.ids) - 1 >= self.prompt

    @property
    def guessable(self) -> int:
        """Tokens that a guess may have so that the reply does not get too long."""
        return self.room - (len(self.ids) - self.prompt) - 1

    def begin(self, reuse: bool) -> None:
        """Called when it starts, or starts again: take over what is computed already."""
        hit, self.memory.routes = 0, []
        if reuse and self.request.prompt_logprobs is None:
            hit = self.memory.reuse(len(self.ids) - 1, self.request.want_experts)
        if len(self._times) == 1:
            self._times.append(time.perf_counter())
            self.cached = hit

    def prepare(self) -> Error | None:
        """Let the grammar say what may follow; the reason if it cannot."""
        try:
            if self.matcher is not None:
                self.matcher.prepare()
        except Error as problem:
            return problem
        return None

    def accept(self, token: int) -> bool:
        """Tell the grammar of a token; whether nothing may follow."""
        if self.matcher is None:
            return False
        self.matcher.advance(token)
        return self.matcher.finished

    def take(
        self, token: int, logprob: float, top: Alternatives, complete: bool, behind: int = 1
    ) -> Event:
        """Add a sampled token and say what it brought; `complete`: a grammar allows no more.

        `behind`: how many positions before the last one computed this token is due to, counted from 1.
        """
        if not math.isfinite(logprob):
            new = len(self.ids) - self.prompt
            raise Error(
                f"the model's logits are not finite after {new} new tokens; check its "
                "weights, or load it with dtype float32"
            )
        if len(self._times) == 2:
            self._times.append(time.perf_counter())
        known = self.memory.routes and len(self.ids) > self.prompt
        experts = self.memory.routes[-1][-behind] if known else None
        self.ids.append(token)
        self._logprobs.append(logprob)
        if self.request.top_logprobs:
            self._top.append(top)
        reason: FinishReason | None = None
        text = ""
        if token in self.request.stop_ids:
            reason = "stop"
        else:
            text = self._text.push(token)
            if self._text.stopped or complete:
                reason = "stop"
            elif len(self.ids) - self.prompt == self.room:
                reason = "length"
        if reason is not None and not self._text.stopped:
            text += self._text.flush()
            if self._text.stopped:
                reason = "stop"
        self._pieces.append(text)
        done = None if reason is None else self.completion(reason)
        return Event(self.index, token, logprob, text, done, top, experts=experts)

    def end(self, reason: FinishReason) -> Event:
        """The last event where no token brings it."""
        self._pieces.append("" if self._text.stopped else self._text.flush())
        return Event(self.index, None, 0.0, self._pieces[-1], self.completion(reason))

    def completion(self, reason: FinishReason) -> Completion:
        request = self.request
        return Completion(
            text="".join(self._pieces),
            ids=self.ids[self.prompt :],
            finish_reason=reason,
            prompt_tokens=self.prompt,
            logprobs=self._logprobs,
            cached_tokens=self.cached,
            top=self._top,
            prompt=self.prompt_tokens if request.prompt_logprobs is not None else None,
            experts=self._experts() if request.want_experts else None,
            timings=self._timings(),
        )

    def _experts(self) -> Tensor | None:
        """Without those of guesses behind the end, which were read with it."""
        routes = self.memory.routes
        return torch.cat(routes)[: len(self.ids) - 1] if routes else None

    def _timings(self) -> Timings:
        now = time.perf_counter()
        added, begun, first = (self._times + [now] * 2)[:3]
        return Timings(begun - added, first - begun, now - first)


class Speculation:
    """Who guesses for a sequence, and what came of it."""

    def __init__(self, drafter: Drafter, costs: Costs, ids: list[int]) -> None:
        self.draft, self.length = drafter.begin(ids), DraftLength(costs)
        self._wanted: int | None = None
        self.current = False
        """Whether the draft has read all but the newest tokens, having guessed in the last step."""

    def wanted(self) -> int:
        """Tokens to guess by its own past; the same until a step has run."""
        if self._wanted is None:
            self._wanted = self.length.choose()
        return self._wanted

    def commit(self, guess: Proposal | None, tokens: list[int]) -> None:
        """The sequence went on with `tokens`."""
        self._wanted, self.current = None, guess is not None
        if guess is not None:
            self.length.record(len(guess.tokens), len(tokens) - 1)
        self.draft.commit(tokens)


class Images:
    """The tiles of a prompt, encoded when the tokens that they fill are computed, and then let go."""

    def __init__(self, request: Request, config: ModelConfig) -> None:
        self.tiles = request.tiles
        self.a_tile = config.vision.tokens_per_tile if config.vision else 1
        patch = config.image_token_index
        self.at = [] if self.tiles is None else [i for i, t in enumerate(request.ids) if t == patch]
        """Positions of patch tokens."""
        self.features: dict[int, Tensor] = {}

    def span(self, a: int, b: int) -> tuple[int, int]:
        """Which patches, of all in order, stand at positions a..b."""
        return bisect_left(self.at, a), bisect_left(self.at, b)

    def needed(self, a: int, b: int) -> list[int]:
        """Tiles to encode for positions a..b."""
        first, end = self.span(a, b)
        if first == end:
            return []
        tiles = range(first // self.a_tile, (end - 1) // self.a_tile + 1)
        return [tile for tile in tiles if tile not in self.features]

    def tile(self, n: int) -> Tensor:
        assert self.tiles is not None
        return self.tiles[n]

    def drop_before(self, position: int) -> None:
        """Forget tiles that lie wholly below."""
        tile = self.span(0, position)[1] // self.a_tile
        self.features = {t: f for t, f in self.features.items() if t >= tile}
