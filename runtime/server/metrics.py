"""/metrics for Prometheus, under vLLM's names, so that its dashboards fit."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from latentrt.runtime.engine.sequence import Event, GenerationResult
from latentrt.runtime.service import EngineService, Request

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Counts what the service's requests do."""

    def __init__(self, service: EngineService, model: str):
        self._service, self._model, self._last = service, model, {}
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(service, model))
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation = self._counter("generation_tokens", "Tokens of answers.")
        self._success = self._counter("request_success", "Answers that ended.", ("finished_reason",))
        self._failed = self._counter("request_failure", "Answers that an error ended.")
        self._first = self._histogram("time_to_first_token_seconds", "Until the first token.", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens.", _BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", "Until the first step.", _WHOLE)
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first step to the first token.", _WHOLE)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _WHOLE)
        self._asked = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._said = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        service.watchers.append(self.watch)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(self, request: Request, events: list[Event]) -> None:
        """Counts the events of one request."""
        now = time.perf_counter()
        for event in events:
            name = id(request), event.index
            if event.token is not None:
                self._generation.inc()
                if name in self._last:
                    self._between.observe(now - self._last[name])
                self._last[name] = now
            if event.result or event.error:
                self._last.pop(name, None)
                self._ended(event.result) if event.result else self._failed.inc()

    def forget(self, request: Request) -> None:
        """Drops what is known of a request that was aborted."""
        for index in range(len(request.sequences)):
            self._last.pop((id(request), index), None)

    def _ended(self, result: GenerationResult) -> None:
        times = result.timings
        self._prompt.inc(result.prompt_tokens)
        self._success.labels(self._model, "stop" if result.finish_reason == "stop" else "length").inc()
        self._first.observe(times.queue_seconds + times.prefill_seconds)
        self._whole.observe(times.queue_seconds + times.prefill_seconds + times.decode_seconds)
        self._queue.observe(times.queue_seconds)
        self._prefill.observe(times.prefill_seconds)
        self._decode.observe(times.decode_seconds)
        self._asked.observe(result.prompt_tokens)
        self._said.observe(len(result.token_ids))

    def _counter(self, name: str, words: str, labels: tuple[str, ...] = ()):
        counter = Counter(f"vllm:{name}", words, ("model_name", *labels), registry=self.registry)
        return counter if labels else counter.labels(self._model)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]):
        return Histogram(f"vllm:{name}", words, ("model_name",), registry=self.registry, buckets=buckets).labels(self._model)


class _Engine:
    """What the engine's own books say at the time of asking."""

    def __init__(self, service: EngineService, model: str):
        self._service, self._model = service, model

    def collect(self):
        schedulers = self._service.engine.loop.schedulers
        gauges = {
            "num_requests_running": ("Answers that take part in steps.", self._service.running),
            "num_requests_waiting": ("Answers whose turn has not come.", self._service.waiting),
            "kv_cache_usage_perc": ("Share of the latent cache in use, 0 to 1.", schedulers.cache_usage),
        }
        counters = {
            "prefix_cache_queries": ("Tokens of prompts that were looked up.", schedulers.total("asked_tokens")),
            "prefix_cache_hits": ("Tokens of prompts that were cached.", schedulers.total("reused_tokens")),
            "spec_decode_num_draft_tokens": ("Tokens that were guessed ahead.", schedulers.total("drafted_tokens")),
            "spec_decode_num_accepted_tokens": ("Guesses that were right.", schedulers.total("accepted_tokens")),
        }
        for kind, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (words, value) in metrics.items():
                family = kind(f"vllm:{name}", words, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family
