"""Many GPUs that serve a model, simulated: a row for every combination of GPU, formats, exchange, batch and lengths."""

from dataclasses import dataclass, field
from itertools import product

from latentrt.errors import UserError
from latentrt.export import targets
from latentrt.export.models.base import Config
from latentrt.export.quantization import BFloat16
from latentrt.planning import full_steps, traces
from latentrt.planning.assumptions import Assumptions
from latentrt.planning.collectives import EXCHANGES
from latentrt.planning.costs import PAGE, Costs, ExpertParallel, Measured, Speeds, TensorParallel
from latentrt.planning.gpus import GpuRow
from latentrt.planning.paper import DEEPSEEK_67B
from latentrt.planning.plan import check_ranks
from latentrt.planning.roofline import USABLE, Deployment
from latentrt.planning.routing import Routing
from latentrt.planning.simulator import Served, SimulatedBackend, refusal, serve
from latentrt.planning.sizes import Model, formats
from latentrt.planning.traces import Request
from latentrt.plugins import cache_formats
from latentrt.plugins.step_graph import Limits

PAPER = {"generated_tokens_per_second": 50_000, "prompt_tokens_per_second": 100_000, "ratio_67b": 5.76,
         "source": "arXiv 2405.04434, section 3.2.3: one node of 8 H800"}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Requests, how they are told apart in tables, and how many may be under way at once."""

    prompt: int | None  # mean lengths; None: of a trace
    answer: int | None
    batch: int | None
    requests: list[Request] = field(repr=False)

    @property
    def context(self) -> int:
        """Tokens of a sequence halfway through its answer, on average."""
        return round(sum(r.prompt_tokens + r.answer_tokens / 2 for r in self.requests) / len(self.requests))

    @property
    def mean_prompt(self) -> int:
        return round(sum(r.prompt_tokens for r in self.requests) / len(self.requests))


@dataclass(frozen=True)
class Question:
    """What is simulated. precisions: "auto" is the best that builds for a GPU have.

    rows, chunk: of a step on each rank, see Deployment and EngineLoop.
    """

    ranks: int
    precisions: list[str]
    caches: list[str]
    exchanges: list[str]
    workloads: list[Workload]
    rows: list[int | None] = field(default_factory=lambda: [None])
    chunk: int | None = None
    skew: float = 0.0
    seed: int = 0
    with_67b: bool = False
    assumed: Assumptions = Assumptions()
    measured: Measured = Measured({})

    def check(self, config: Config) -> None:
        """UserError for what cannot be."""
        check_ranks(config, "--ranks", self.ranks)
        tables = (("--cache-format", self.caches, cache_formats.NAMES), ("--exchange", self.exchanges, EXCHANGES))
        for option, values, accepted in tables:
            for value in values:
                if value not in accepted:
                    raise UserError(f"{option} is {value!r}, accepted: {', '.join(accepted)}")
        for option, value in (*(("--rows", n) for n in self.rows), ("--chunk", self.chunk)):
            if value is not None and value < 1:
                raise UserError(f"{option} is {value}, accepted: 1 or more")
        if not 0 <= self.skew <= 10:
            raise UserError(f"--skew is {self.skew:g}, accepted: 0 (all experts alike) to 10")


def workloads(prompts: list[int], answers: list[int], batches: list[int], requests: int | None, rate: float | None,
              spread: float, seed: int) -> list[Workload]:  # fmt: skip
    """Drawn ones: by default twice as many requests as a batch has, 512 where all that have come are served at once."""
    found = []
    for prompt, answer, batch in product(prompts, answers, batches or [None]):
        count = requests or (2 * batch if batch else 512)
        found.append(Workload(prompt, answer, batch, traces.draw(count, prompt, answer, rate, spread, seed)))
    return found


def simulate(config: Config, gpus: list[GpuRow], question: Question) -> dict:
    """Rows for JSON, with all that was assumed. Raises UserError for what cannot be."""
    question.check(config)
    model, q = Model.of(config), question
    for workload in q.workloads:
        if wrong := refusal(workload.requests, config.max_position_embeddings, config.max_position_embeddings):
            raise UserError(wrong)
    routing = Routing(config, q.ranks, q.skew, q.seed)
    kinds = dict.fromkeys((gpu, targets.precision(targets.find(gpu.target), p)) for gpu in gpus for p in q.precisions)
    rows = []
    for (gpu, precision), cache, exchange, size, workload in product(kinds, q.caches, q.exchanges, q.rows, q.workloads):
        deployment = Deployment(model, gpu, q.ranks, formats(model)[precision], cache, size)
        rows.append(_row(deployment, precision, exchange, workload, routing, q))
    if q.with_67b:
        _add_67b(rows, model, gpus, q)
    return {
        "ranks": q.ranks, "usable_memory": USABLE, "rows": rows, "paper": PAPER, "seed": q.seed, "skew": q.skew,
        "ranks_reached": routing.reached, "assumptions": q.assumed.table(), "measured": sorted(q.measured.points),
    }  # fmt: skip


def _row(deployment: Deployment, precision: str, exchange: str, workload: Workload, routing: Routing, q: Question) -> dict:
    """One simulation; a `refusal` takes the place of results where weights or requests do not fit."""
    costs = ExpertParallel(deployment, Speeds(deployment.gpu, q.assumed), exchange, routing, q.measured)
    tokens = deployment.capacity // deployment.count // PAGE * PAGE
    row = {
        "gpu": deployment.gpu.name, "precision": precision, "cache_format": deployment.cache_format, "exchange": exchange,
        "rows_per_rank": deployment.limits.max_batch_tokens,
        "prompt": workload.prompt, "answer": workload.answer, "batch": workload.batch,
        "exchanged_bytes_per_row_and_layer": costs.exchange.row_bytes() if deployment.count > 1 else 0.0,
        "memory_per_rank": {
            "replicated_bytes": deployment.replicated, "experts_bytes": deployment.held - deployment.replicated,
            "workspace_bytes": deployment.workspace, "cache_bytes": deployment.left, "cache_tokens": tokens,
        },
        "served": None, "full_steps": None,
        "refusal": refusal(workload.requests, deployment.limits.max_context, tokens) if tokens else "the weights leave no room",
    }  # fmt: skip
    if not row["refusal"]:
        row["full_steps"] = _full_steps(costs, deployment, workload, q.assumed)
        backend = SimulatedBackend(costs, deployment.limits, [1 + tokens // PAGE] * deployment.count, q.assumed)
        row["served"] = summary(serve(backend, workload.requests, workload.batch, q.chunk), backend)
    return row


def _full_steps(costs: Costs, deployment: Deployment, workload: Workload, assumed: Assumptions) -> dict:
    """Tokens a second where nothing waits: all decode, in as large a batch as fits; and where prompts alone are read."""
    ranks, context, rows = deployment.count, workload.context, deployment.limits.max_batch_tokens
    fits = min(deployment.limits.max_sequences, deployment.capacity // ranks // context)
    own = min(fits, -(-workload.batch // ranks)) if workload.batch else fits
    found = {"context": context, "batch": ranks * own, "prompt": workload.mean_prompt, "decode": None}
    if own:
        seconds = full_steps.seconds(costs, ranks, full_steps.decoding(own, context)) + assumed.host_seconds(ranks * own)
        found["decode"] = ranks * own / seconds
    reading = full_steps.reading(workload.mean_prompt, rows)
    seconds = sum(full_steps.seconds(costs, ranks, b) + assumed.host_seconds(ranks * len(b.cached_lengths)) for b in reading)
    return found | {"prompts": ranks * sum(len(batch.input_ids) for batch in reading) / seconds}


def summary(served: Served, backend: SimulatedBackend) -> dict:
    """Rates in tokens a second, times in seconds."""
    asked, told = (sum(getattr(r, n) for r in served.requests) for n in ("prompt_tokens", "answer_tokens"))
    spent = sum(backend.times.values())
    return {
        "requests": len(served.requests), "seconds": served.seconds, "steps": len(served.ends),
        "generated_tokens": sum(served.told), "generated_tokens_per_second": sum(served.told) / served.seconds,
        "steady_generated_tokens_per_second": served.steady, "prompt_tokens_per_second": asked / served.seconds,
        "first_token": {p: served.first_token(p) for p in (50, 99)},
        "between_tokens": {p: served.between_tokens(p) for p in (50, 99)},
        "sequences_per_step": backend.sequences / len(served.ends), "most_waiting": served.most_waiting,
        "recomputed_tokens": backend.rows - asked - told + len(served.requests),
        "time_shares": {part: seconds / spent for part, seconds in backend.times.items()},
    }  # fmt: skip


def _add_67b(rows: list[dict], model: Model, gpus: list[GpuRow], q: Question) -> None:
    """Puts what becomes of the same requests on DeepSeek 67B beside each row, and the ratio of generated tokens a second."""
    found = {
        (gpu.name, size, n): _served_67b(gpu, workload, Deployment(model, gpu, q.ranks, BFloat16(), "bfloat16", size).limits, q)
        for gpu, size, (n, workload) in product(gpus, q.rows, enumerate(q.workloads))
    }
    for number, row in enumerate(rows):
        place, workload = divmod(number, len(q.workloads))
        row["served_67b"] = other = found[row["gpu"], q.rows[place % len(q.rows)], workload]
        rates = [served["generated_tokens_per_second"] for served in (row["served"], other) if served]
        row["ratio_67b"] = rates[0] / rates[1] if len(rates) == 2 else None


def _served_67b(gpu: GpuRow, workload: Workload, own: Limits, q: Question) -> dict | None:
    """None where it does not fit. One scheduler has what the limits of a rank of ours, `own`, are on all of them."""
    limits = Limits(own.max_context, q.ranks * own.max_batch_tokens, q.ranks * own.max_sequences)
    free = q.ranks * USABLE * gpu.memory * 1e9 - 2 * DEEPSEEK_67B.parameters
    pages = int(free // DEEPSEEK_67B.cache_bytes) // PAGE
    if pages < 1:
        return None
    backend = SimulatedBackend(TensorParallel(DEEPSEEK_67B, q.ranks, Speeds(gpu, q.assumed)), limits, [1 + pages], q.assumed)
    chunk = q.chunk * q.ranks if q.chunk else None
    return summary(serve(backend, workload.requests, workload.batch, chunk), backend) | {"cache_tokens": pages * PAGE}
