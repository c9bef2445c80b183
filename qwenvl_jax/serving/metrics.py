"""The server's numbers for Prometheus, under the names that vLLM gave them and with a prefix of our own.

Each server has a registry of its own. Numbers of the engine are read when somebody asks.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwenvl_jax.serving.replies import Engine

PREFIX = "qwenvl:"
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


class Metrics:
    """Counters, histograms and gauges of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # a series more for each, which says only when the server started
        self._registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, those of pictures included.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of replies.")
        self.image_tokens = self._counter("image_tokens", "Tokens of prompts that stand for pictures.")
        self.success = self._counter("request_success", "Replies that came to their end.", "finished_reason")
        self.failures = self._counter("request_failure", "Requests that ended in an error while generating.", "code")
        self.rejected = self._counter("requests_rejected", "Requests turned away because all places were taken.")
        self.disconnects = self._counter("client_disconnects", "Requests whose clients went away before the end.")
        self.image_rejected = self._counter("image_rejected", "Pictures that could not be used.", "code")
        self.http = self._counter("http_requests", "HTTP requests.", "route", "method", "status")
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of a reply.", TOKENS)
        self.request_max_tokens = self._histogram("request_params_max_tokens", "Tokens that were allowed.", TOKENS)
        self.request_n = self._histogram("request_params_n", "Replies that were asked for.", (1, 2, 4, 8, 16, 32, 64))
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", SECONDS
        )
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between two tokens.", SHORT_SECONDS)
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "Until the engine began with a reply.", SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "From there to its first token.", SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "From its first token to its last.", SECONDS)
        self.inference = self._histogram("request_inference_time_seconds", "Prefill and decode together.", SECONDS)
        self.images = self._histogram("image_load_seconds", "Loading the pictures of a request.", SECONDS)

    def watch(self, engine: Engine) -> None:
        """Shows the engine's own numbers, too."""
        self._registry.register(_OfEngine(engine))

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self._registry)


class _OfEngine(Collector):
    """The numbers of an engine at the moment."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        hits, queries = engine.picture_hits
        prefix_hits, prefix_queries = engine.prefix_hits
        last_step = time.time() - (time.monotonic() - engine.last_step)
        for name, text, value in (
            ("num_requests_running", "Replies being generated.", engine.running),
            ("num_requests_waiting", "Replies waiting for a slot.", engine.waiting),
            ("kv_cache_usage_perc", "Share of the cache that holds tokens, 0 to 1.", engine.cache_usage),
            ("engine_last_step_timestamp", "When the engine last did something, Unix time.", last_step),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value)
        for name, text, value in (
            ("mm_cache_queries", "Pictures of prompts.", queries),
            ("mm_cache_hits", "Pictures whose features were there already.", hits),
            ("prefix_cache_queries", "Tokens of prompts.", prefix_queries),
            ("prefix_cache_hits", "Tokens of prompts that were read before.", prefix_hits),
            ("recompiles", "Programs compiled after the start; 0 unless there is a bug.", engine.recompiles),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value)
