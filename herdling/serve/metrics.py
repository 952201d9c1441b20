"""What `/metrics` shows: counts of calls, the engine's own counts, and where the time goes.

Every service has a registry of its own, so several can live in one process. Names begin with
`herdling_`; units are seconds, tokens, bytes. No label ever holds what a user wrote.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from herdling.infer.request import Completion, Timings
    from herdling.serve.service import Service

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """The counts of one service."""

    def __init__(self, service: "Service") -> None:
        disable_created_metrics()  # a second line for every count, of its age
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "herdling_requests", "Calls answered.", ["route", "status"], registry=self.registry
        )
        self._finished = Counter(
            "herdling_replies", "Replies ended, by reason.", ["reason"], registry=self.registry
        )
        self._seconds = self._histogram("request_seconds", "From a call to the end of its answer.")
        self._phases = {
            "queue": self._histogram("queue_seconds", "From a call to its first step."),
            "prefill": self._histogram("prefill_seconds", "Reading a prompt."),
            "decode": self._histogram("decode_seconds", "From the first token to the last."),
        }
        self._guarded = Counter(
            "herdling_guarded",
            "Messages that safeguards objected to, by what was done.",
            ["where", "action", "category"],
            registry=self.registry,
        )
        self._token = self._histogram("token_seconds", "Decode time per token, by reply.")
        self.registry.register(_EngineCollector(service))

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"herdling_{name}", about, buckets=_SECONDS, registry=self.registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a call; `route` is the pattern, not the path."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.observe(seconds)

    def ended(self, completion: "Completion") -> None:
        """Count a reply."""
        self._finished.labels(completion.finish_reason).inc()
        timings: Timings | None = completion.timings
        if timings is None:
            return
        for phase, histogram in self._phases.items():
            histogram.observe(getattr(timings, phase))
        if len(completion.ids) > 1:
            self._token.observe(timings.decode / (len(completion.ids) - 1))

    def guarded(self, where: str, action: str, categories: Iterable[str]) -> None:
        """Count a verdict on `input` or `output` once for each of its categories."""
        for category in categories:
            self._guarded.labels(where, action, category).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's counts at the moment of asking."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        worker = self._service.worker
        yield GaugeMetricFamily("herdling_up", "1 when calls are answered.", _up(self._service))
        stats = worker.stats if worker is not None else None
        if worker is None or stats is None:
            return
        for name, about, value in (
            ("requests_running", "Requests in the batch.", stats.running),
            ("requests_waiting", "Requests without a place in the batch.", stats.waiting),
            ("requests_open", "Requests taken on and not ended.", worker.open),
            ("cache_pages", "Pages of the key-value cache.", stats.pages),
            ("cache_pages_used", "Pages that requests hold.", stats.pages_used),
            (
                "cache_pages_reusable",
                "Pages kept for prompts that begin alike.",
                stats.pages_cached,
            ),
            ("cache_page_bytes", "Size of a page.", stats.page_bytes),
        ):
            yield GaugeMetricFamily(f"herdling_{name}", about, value)
        for name, about, value in (
            ("prompt_tokens", "Prompt tokens taken.", stats.prompt_tokens),
            ("cached_tokens", "Prompt tokens that needed no computing.", stats.cached_tokens),
            ("new_tokens", "Tokens sampled.", stats.new_tokens),
            ("steps", "Steps of the engine.", stats.steps),
            ("preemptions", "Requests put back for want of memory.", stats.preemptions),
            ("drafted_tokens", "Tokens proposed by speculation.", stats.drafted),
            ("accepted_tokens", "Proposed tokens that were right.", stats.accepted),
        ):
            yield CounterMetricFamily(f"herdling_{name}", about, value)
        load = CounterMetricFamily(
            "herdling_expert_tokens", "Tokens that an expert took.", labels=["layer", "expert"]
        )
        for layer, experts in enumerate(stats.expert_load):
            for expert, tokens in enumerate(experts):
                load.add_metric([str(layer), str(expert)], tokens)
        yield load


def _up(service: "Service") -> int:
    return int(service.lm is not None and service.failure is None and not service.draining)
