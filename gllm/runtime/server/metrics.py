"""What Prometheus scrapes: vLLM's names with our prefix, measured at the front end with one monotonic clock."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gllm.runtime.server.service import service_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from gllm.runtime.outputs import Delta
    from gllm.runtime.server.engine import ServedEngine

router = APIRouter()

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
GAUGES = {  # name after `gllm_`: (field of the engine's numbers, what it is)
    "num_requests_running": ("num_running", "Requests in the batch."),
    "num_requests_waiting": ("num_waiting", "Requests that wait to be admitted."),
    "kv_cache_usage_perc": ("kv_usage", "Share of the KV cache's blocks in use, 0 to 1."),
}
COUNTERS = {
    "num_preemptions": ("num_preemptions", "Sequences that gave their blocks back and start again."),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
}


class EngineCollector(Collector):
    """The engine's own numbers, asked for when they are scraped."""

    def __init__(self, engine: ServedEngine) -> None:
        self.engine = engine

    def describe(self) -> Iterator[Metric]:
        """Names alone, so that registering asks the engine nothing."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The numbers now."""
        stats, name = self.engine.stats(), [self.engine.model_name]
        for family, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for metric, (number, text) in table.items():
                each = family(f"gllm_{metric}", text, labels=["model_name"])
                each.add_metric(name, getattr(stats, number))
                yield each


class Metrics:
    """One application's registry and what the front end measures."""

    def __init__(self, engine: ServedEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self._name = engine.model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got a first token.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.time_to_first_token_s = self._histogram("time_to_first_token_seconds", "Arrival to first token.", SECONDS)
        self.inter_token_s = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.", SECONDS)
        text = "Mean time of an answer's tokens after its first."
        self.time_per_token_s = self._histogram("request_time_per_output_token_seconds", text, SECONDS)
        self.e2e_s = self._histogram("e2e_request_latency_seconds", "Arrival to an answer's end.", SECONDS)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        labels = ["model_name", "finished_reason"]
        self._success = Counter("gllm_request_success", "Answers, by why they ended.", labels, registry=self.registry)

    def finished(self, reason: str) -> None:
        """One more answer ended so."""
        self._success.labels(self._name, reason).inc()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"gllm_{name}", text, ["model_name"], registry=self.registry).labels(self._name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"gllm_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self._name)


class _Lap:
    """One answer so far."""

    __slots__ = ("first_s", "last_s", "num_tokens")

    def __init__(self, now_s: float) -> None:
        self.first_s = self.last_s = now_s
        self.num_tokens = 0


class Stopwatch:
    """Measures one HTTP request, which arrived at `start_s` of the monotonic clock."""

    def __init__(self, metrics: Metrics, start_s: float) -> None:
        self._metrics = metrics
        self._start_s = start_s
        self._laps: dict[tuple[int, int], _Lap] = {}
        self._jobs: set[int] = set()

    def saw(self, job: int, delta: Delta, num_prompt_tokens: int) -> None:
        """A delta came. Tokens that come together share the time since the last ones."""
        now_s, metrics = time.monotonic(), self._metrics
        if delta.token_ids and job not in self._jobs:
            self._jobs.add(job)
            metrics.time_to_first_token_s.observe(now_s - self._start_s)
            metrics.prompt_tokens.inc(num_prompt_tokens)
            metrics.request_prompt_tokens.observe(num_prompt_tokens)
        if delta.token_ids:
            self._saw_tokens(job, delta, now_s)
        if delta.finish_reason is not None:
            self._saw_end(job, delta, now_s)

    def _saw_tokens(self, job: int, delta: Delta, now_s: float) -> None:
        num_tokens, key = len(delta.token_ids), (job, delta.index)
        self._metrics.generation_tokens.inc(num_tokens)
        if (lap := self._laps.get(key)) is None:
            lap = self._laps[key] = _Lap(now_s)
        else:
            for _ in range(num_tokens):
                self._metrics.inter_token_s.observe((now_s - lap.last_s) / num_tokens)
        lap.last_s = now_s
        lap.num_tokens += num_tokens

    def _saw_end(self, job: int, delta: Delta, now_s: float) -> None:
        metrics, lap = self._metrics, self._laps.get((job, delta.index))
        metrics.finished(delta.finish_reason or "")
        metrics.e2e_s.observe(now_s - self._start_s)
        metrics.request_generation_tokens.observe(lap.num_tokens if lap else 0)
        if lap is not None and lap.num_tokens > 1:
            metrics.time_per_token_s.observe((lap.last_s - lap.first_s) / (lap.num_tokens - 1))


@router.get("/metrics")
async def scrape(request: Request) -> Response:
    """All numbers in Prometheus' text format."""
    registry = service_of(request).metrics.registry
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
