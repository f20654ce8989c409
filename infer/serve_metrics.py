"""What /metrics tells Prometheus. METRICS is the table of all names."""
import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

# Seconds. Percentiles are read off these: histogram_quantile(0.95, rate(assay_ttft_seconds_bucket[5m])).
TIMES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
METRICS = {
  "assay_queue_wait_seconds": "from a request's arrival to the step that takes it up",
  "assay_ttft_seconds": "from a request's arrival to its first token",
  "assay_inter_token_seconds": "from one token of a text to the next",
  "assay_end_to_end_seconds": "from a request's arrival to the end of its text",
  "assay_http_responses": "by path and status",
  "assay_errors": "by code, those after an answer has begun included",
  "assay_prompt_tokens": "of prompts that were accepted",
  "assay_generated_tokens": "made",
  "assay_prefix_hit_tokens": "of prompts, found in the prefix cache",
  "assay_preemptions": "texts that gave their pages up and are computed again",
  "assay_compiles": "programs compiled; flat after the start",
  "assay_engine_steps": "of the device",
  "assay_running": "texts that have a slot",
  "assay_waiting": "texts that wait for one",
  "assay_pages_used": "of the cache, held by texts",
  "assay_pages_capacity": "of the cache",
  "assay_engine_beat_age_seconds": "since the engine's thread last went round; stuck is more than --stuck_s",
}
COUNTERS = {"prompt_tokens": "assay_prompt_tokens", "generated_tokens": "assay_generated_tokens",
            "prefix_hit_tokens": "assay_prefix_hit_tokens", "preemptions": "assay_preemptions",
            "compiles": "assay_compiles", "steps": "assay_engine_steps"}  # The engine's name -> ours.
GAUGES = {"running": "assay_running", "waiting": "assay_waiting", "pages_used": "assay_pages_used",
          "pages_total": "assay_pages_capacity"}


class Metrics:
  """The metrics of one server, in a registry of their own.

  Attributes:
    snapshot: a function that gives the engine's (gauges, counters, age of its beat); set by the worker.
  """

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    histogram = lambda name: prometheus_client.Histogram(name, METRICS[name], buckets=TIMES,
                                                         registry=self.registry)
    self.ttft, self.inter_token = histogram("assay_ttft_seconds"), histogram("assay_inter_token_seconds")
    self.end_to_end = histogram("assay_end_to_end_seconds")
    self.queue_wait = histogram("assay_queue_wait_seconds")
    counter = lambda name, labels: prometheus_client.Counter(name, METRICS[name], labels,
                                                             registry=self.registry)
    self.responses = counter("assay_http_responses", ("path", "status"))
    self.errors = counter("assay_errors", ("code",))
    self.snapshot = lambda: ({}, {}, 0.0)
    self.registry.register(self)

  def collect(self):
    gauges, counters, age = self.snapshot()
    for name, ours in COUNTERS.items():
      yield CounterMetricFamily(ours, METRICS[ours], value=counters.get(name, 0))
    for name, ours in GAUGES.items():
      yield GaugeMetricFamily(ours, METRICS[ours], value=gauges.get(name, 0))
    ours = "assay_engine_beat_age_seconds"
    yield GaugeMetricFamily(ours, METRICS[ours], value=age)

  def render(self) -> bytes:
    return prometheus_client.generate_latest(self.registry)
