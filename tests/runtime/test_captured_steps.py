"""CUDA graphs of steps without a GPU: padded shapes, what is captured and when, and what becomes of results and memory."""

from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime import backends
from latentrt.runtime.backends import padding
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.backends.forms import FormChooser, Head
from latentrt.runtime.backends.padding import StepShape
from latentrt.runtime.backends.torch.captured import Graphs
from latentrt.runtime.backends.torch.graph import StepProgram
from latentrt.runtime.backends.torch.step import StepRunner
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import StepMemoryError
from tests import ragged
from tests.runtime.test_torch_backend import LENGTHS, bfloat16_graph, sequences, single  # noqa: F401

PAGE = 64


def batch_of(*parts: tuple[int, int], pages: int = 0, logits: bool = True) -> StepBatch:
    """Sequences of (new tokens, cached tokens); the last new one has logits."""
    rows = [SequenceRows(range(7, 7 + new), past, [new - 1] * logits) for new, past in parts]
    width = pages or max(-(-(new + past) // PAGE) for new, past in parts)
    return pack(rows, np.arange(1, 1 + len(parts) * width).reshape(len(parts), width))


@pytest.mark.parametrize(("batch", "shape"), [
    (batch_of((2048, 0)), StepShape(2048, 1, 1, 32)),
    (batch_of((2033, 0)), StepShape(2048, 1, 1, 32)),
    (batch_of((2048, 2048), logits=False), StepShape(2048, 1, 1, 64)),
    (batch_of((1300, 900), (5, 0), (1, 60)), StepShape(1664, 4, 4, 64)),
    (batch_of((3, 0)), StepShape(16, 1, 1, 8)),
    (batch_of((3, 0), pages=100), StepShape(16, 1, 1, 100)),
    (batch_of(*[(4, 30)] * 64), StepShape(256, 64, 64, 8)),
    (batch_of(*[(4, 30)] * 65), None),
    (batch_of((4097, 0)), None),
    (pack([SequenceRows(range(80), 0, range(65))], np.ones((1, 2))), None),
    (pack([SequenceRows(range(80), 0, range(64))], np.ones((1, 2))), StepShape(128, 1, 64, 8)),
])  # fmt: skip
def test_prompt_shapes(batch, shape):
    assert padding.prompt_shape(batch, max_pages=100) == shape


def test_little_of_a_large_prompt_is_padding():
    sizes = padding.PROMPT_ROWS
    assert list(sizes) == sorted(sizes) and all(n % 16 == 0 for n in sizes)
    for smaller, size in pairwise(sizes):
        assert smaller < 192 or size - (smaller + 1) < size / 4


def padded(batch: StepBatch, shape: StepShape) -> StepBatch:
    """As a graph gets it; what is not written would show."""
    offsets, length = shape.offsets()
    buffer = np.full(length, -7, np.int32)
    padding.fill(batch, shape, buffer)
    return StepBatch(**{n: buffer[o : o + int(np.prod(s))].reshape(s) for (n, o), s in
                        zip(offsets.items(), shape.sizes().values(), strict=True)})  # fmt: skip


TABLE = np.array([[1, 2], [3, 0], [4, 5]])


@pytest.mark.parametrize(("chunks", "shape"), [
    ([([9], [0]), ([8], [0]), ([7], [0])], StepShape(4, 4, 4, 2)),
    ([(range(40), [39]), ([8], []), (range(5, 22), [0, 9, 16])], StepShape(64, 4, 4, 8)),
    ([(range(3), [2]), ([], []), (range(9), [])], StepShape(16, 4, 4, 8)),
], ids=["decode", "prompts", "with nothing new"])  # fmt: skip
def test_padded_step_equals_plain(tiny_bundle, chunks, shape):
    """What a captured CUDA graph is given: fixed shapes, padding rows, empty sequences. The cache is the same afterwards."""
    backend = backends.load(Bundle(tiny_bundle), "cpu", backend="torch", cache_tokens=1024)
    for cache in backend.caches:
        cache.zero_()
    lengths = 70, 3, 65
    backend.step(pack([SequenceRows(range(n), 0, []) for n in lengths], TABLE))
    batch = pack([SequenceRows(tokens, n, told) for (tokens, told), n in zip(chunks, lengths, strict=True)], TABLE)
    kept, found = [c.clone() for c in backend.caches], []
    decoding = all(len(tokens) == 1 for tokens, _ in chunks)
    assert (padding.decode_shape(batch) if decoding else padding.prompt_shape(batch)) == shape
    for given in (batch, padded(batch, shape)):
        for cache, old in zip(backend.caches, kept, strict=True):
            cache.copy_(old)
        logits = backend.step(given).logits()[: len(batch.logit_rows)]
        found.append([logits, *(c[1:].numpy().copy() for c in backend.caches)])  # page 0 is scratch
    for plain, other in zip(*found, strict=True):
        assert np.abs(other - plain).max() <= 1e-5 * np.abs(plain).max()


class StandIn:
    """torch.cuda's graphs without a GPU: a replay calls again what was captured, and ruins all that other graphs of its pool
    have left. `refused`: how often a capture may still begin before it finds too little memory; None: always."""

    def __init__(self, monkeypatch):
        self.capturing, self.replayed, self.refused, graphs = None, [], None, []
        stand_in = self

        class Graph:
            def replay(self):
                stand_in.replayed.append(self)
                for graph in graphs:
                    if graph.pool is self.pool:
                        graph.outputs["logits"].fill_(float("nan"))
                for name, value in self.again().items():
                    self.outputs[name].copy_(value)

        @contextmanager
        def graph(graph, pool):
            if self.refused is not None:
                if not self.refused:
                    raise torch.OutOfMemoryError("CUDA out of memory while capturing\nmore")
                self.refused -= 1
            graph.pool, self.capturing = pool, graph
            yield
            graphs.append(graph)
            self.capturing = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch, "cuda", SimpleNamespace(
            CUDAGraph=Graph, graph=graph, Stream=lambda device: stream, current_stream=lambda device: stream,
            stream=lambda s: nullcontext(), graph_pool_handle=object,
            Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
        ))  # fmt: skip

    def watch(self, run):
        """`run` of a program, which leaves word of a capture."""

        def watched(inputs):
            outputs = run(inputs)
            if self.capturing:
                self.capturing.outputs, self.capturing.again = outputs, lambda: run(inputs)
            return outputs

        return watched

    def capture(self, runner: StepRunner) -> StepRunner:
        """`runner`, as if its device were a GPU."""
        runner.capture, runner._pool = True, object()
        return runner


@pytest.fixture
def gpu(monkeypatch):
    return StandIn(monkeypatch)


class Echo:
    """A program whose logits say what its inputs hold for every logit row: id, position, first page, number of its form.

    `memory`: how many more runs find enough; None: all.
    """

    device = torch.device("cpu")

    def __init__(self, number: int, gpu: StandIn):
        self.number, self.memory, self.shapes, self.run = number, None, [], gpu.watch(self._run)

    def _run(self, inputs: dict) -> dict:
        self.shapes.append((len(inputs["input_ids"]), *inputs["block_table"].shape))
        if self.memory is not None:
            self.memory -= 1
            if self.memory < 0:
                self.memory = None
                raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        rows = inputs["logit_rows"].long()
        owner = torch.searchsorted(inputs["query_starts"], rows.int(), right=True) - 1
        pages = inputs["block_table"][owner.clamp_max(len(inputs["block_table"]) - 1), 0]
        found = inputs["input_ids"][rows], inputs["positions"][rows], pages, torch.full_like(pages, self.number)
        return {"logits": torch.stack(found, 1).float()}


HEAD = Head(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, page_size=PAGE)
CACHES = {"latent_cache.0": torch.zeros(1, PAGE, 4)}


def echoing(gpu: StandIn, **options) -> StepRunner:
    programs = {form: Echo(number, gpu) for number, form in enumerate(("absorbed", "expanded"))}
    return gpu.capture(StepRunner(programs, CACHES, FormChooser(tuple(programs), HEAD), **options))


def answer(batch: StepBatch, number: int) -> np.ndarray:
    """What `Echo` says of `batch`."""
    owner = np.searchsorted(batch.query_starts, batch.logit_rows, side="right") - 1
    rows = batch.input_ids[batch.logit_rows], batch.positions[batch.logit_rows], batch.block_table[owner, 0]
    return np.stack([*rows, np.full(len(owner), number)], 1)


def test_prompts_are_captured_when_their_shape_comes_again(gpu):
    runner = echoing(gpu)
    absorbed, expanded = runner.programs.values()
    for count, (new, past) in enumerate([(500, 0), (450, 64), (512, 0)]):
        batch = batch_of((new, past), pages=9)
        assert np.array_equal(runner.step(batch).logits(), answer(batch, 1))
        assert list(runner._prompts) == ([(StepShape(512, 1, 1, 16), "expanded")] if count else [])
        assert len(gpu.replayed) == count
    # eager as it is, then a warm-up, the capture, and what stands for two replays
    assert expanded.shapes == [(500, 1, 9)] + [(512, 1, 16)] * 4 and not absorbed.shapes


def test_a_prompts_form_is_chosen_for_its_padded_shape(gpu):
    """More rows are expanded, and one shape may be captured twice."""
    runner = echoing(gpu)
    for parts, number in (((200, 3000), 0), ((250, 8000), 1)):
        batch = batch_of(parts, pages=128)
        for _ in range(2):
            assert np.array_equal(runner.step(batch).logits(), answer(batch, number))
    assert list(runner._prompts) == [(StepShape(256, 1, 1, 128), form) for form in ("absorbed", "expanded")]


def test_results_of_both_passes_survive_each_other(gpu):
    """All graphs share a pool: what one leaves is gone after another's replay."""
    runner = echoing(gpu)
    batch = batch_of((1, 70), (300, 0), (1, 5), (20, 7))
    for _ in range(3):
        found = runner.step(batch).logits()
        assert np.array_equal(found[:, :3], answer(batch, 0)[:, :3])
    assert len(runner._prompts) == len(runner._graphs) == 1 and len(gpu.replayed) == 2 + 3


def test_without_capture_or_in_lockstep_prompts_stay_eager(gpu):
    for runner in (echoing(gpu), echoing(gpu, lockstep=True)):
        runner.capture = runner.lockstep
        for _ in range(3):
            runner.step(batch_of((300, 0)))
        runner.step_padded(batch_of((300, 0)), StepShape(320, 1, 1, 8), decoding=False)
        assert not len(runner._prompts) and not gpu.replayed
        assert {shape for p in runner.programs.values() for shape in p.shapes} == {(300, 1, 5), (320, 1, 8)}


def test_prompts_that_cannot_be_captured(gpu, capsys):
    """They run eagerly from then on, which is said once; what decodes is captured all the same."""
    runner, gpu.refused = echoing(gpu), 0
    pool = runner._pool
    for new in (300, 300, 300, 600, 600):
        batch = batch_of((new, 0))
        assert np.array_equal(runner.step(batch).logits(), answer(batch, 1))
    assert "out of memory" in runner.uncaptured_prompts and not runner.uncaptured
    assert capsys.readouterr().err.count("prompts run without CUDA graphs") == 1
    gpu.refused = None
    runner.step(batch_of((1, 5)))
    assert runner._pool is not pool, "PyTorch refuses a pool that no graph holds any more"
    assert len(runner._graphs) == 1 and not len(runner._prompts)


def test_graphs_of_prompts_make_room(gpu, capsys):
    """A step that finds too little memory runs again without them; steps that decode are captured again, in a new pool."""
    runner = echoing(gpu)
    for parts in ((1, 5), (300, 0), (300, 0)):
        runner.step(batch_of(parts))
    pool, large = runner._pool, batch_of((2000, 0))
    assert len(runner._graphs) == len(runner._prompts) == 1
    runner.programs["expanded"].memory = 0
    assert np.array_equal(runner.step(large).logits(), answer(large, 1))
    assert not len(runner._graphs) and not len(runner._prompts) and runner._pool is not pool
    assert "their memory was needed (CUDA out of memory)" in capsys.readouterr().err
    for parts in ((1, 5), (2000, 0), (2000, 0)):
        runner.step(batch_of(parts))
    assert len(runner._graphs) == 1 and not len(runner._prompts) and not runner.uncaptured
    runner.programs["expanded"].memory = 0
    with pytest.raises(StepMemoryError):
        runner.step(large)


def test_a_decode_step_takes_the_memory_of_prompts_graphs(gpu):
    runner = echoing(gpu)
    for _ in range(2):
        runner.step(batch_of((300, 0)))
    runner.programs["absorbed"].memory = 0
    batch = batch_of((1, 5))
    assert np.array_equal(runner.step(batch).logits(), answer(batch, 0))
    assert len(runner._graphs) == 1 and not len(runner._prompts) and not runner.uncaptured


def test_of_captured_shapes_the_last_used_are_kept():
    graphs, made = Graphs("steps", 2), []
    a, b, c = (StepShape(n, n, n, 1) for n in (1, 2, 4))
    for shape in (a, b, a, c, a):
        assert graphs.get(shape, "absorbed", lambda s=shape: made.append(s) or s) == shape
    assert [shape for shape, _ in graphs] == [c, a] and made == [a, b, c]


def test_a_shape_that_was_dropped_is_new_again():
    """Else shapes that take turns would be captured over and over; and not all shapes that came once are remembered."""
    graphs, made = Graphs("prompts", 1, asked=2), []

    def ask(rows: int) -> bool:
        shape = StepShape(rows, 1, 1, 8)
        return graphs.get(shape, "absorbed", lambda: made.append(rows) or shape) is not None

    assert [ask(n) for n in (1, 1, 1, 2, 2, 1, 1)] == [False, True, True, False, True, False, True] and made == [1, 2, 1]
    assert not any(ask(n) for n in range(10, 15)) and not ask(10) and ask(14)


@pytest.mark.slow
def test_captured_steps_of_a_model(bfloat16_graph, gpu, monkeypatch):  # noqa: F811
    """The whole way of a captured step, prompts of many tokens and those that decode."""
    proto, weights, c = bfloat16_graph
    program = StepProgram(proto, weights, "cpu", "reference")
    monkeypatch.setattr(program, "run", gpu.watch(program.run))
    width, logits = c.kv_lora_rank + c.qk_rope_head_dim, []
    for capture in (False, True):
        caches = {f"latent_cache.{i}": torch.zeros(12, 64, width, dtype=torch.bfloat16) for i in range(c.num_hidden_layers)}
        runner = single(program, caches, sizes=(1, 2, 4, 8))
        if capture:
            gpu.capture(runner)
        tokens = [[*s, 1, 2] for s in sequences(320)]
        chunks = [[8, 3, 9, 0, 11], [10, 2, 7, 0, 9]]
        rest = [n - 2 - sum(done) for n, done in zip(map(len, tokens), zip(*chunks, strict=True), strict=True)]
        schedule, pages = [*chunks, rest, *[[1] * len(LENGTHS)] * 2], ragged.Pages([len(t) for t in tokens], 64)
        # on a GPU the copy is made by the way to the host
        found = ragged.run(lambda i, r=runner: r.step(StepBatch(**i)).logits().copy(), tokens, schedule, pages)
        logits.append(np.concatenate(found))
    # the third step held prompts and a sequence of one token: that was a pass of its own
    assert [shape for shape, _ in runner._graphs] == [StepShape(1, 1, 1, 1), StepShape(8, 8, 8, 4)]
    assert [shape for shape, _ in runner._prompts] == [StepShape(32, 8, 32, 8)] and len(gpu.replayed) == 4
    assert np.abs(logits[0] - logits[1]).max() <= 0.02 * np.abs(logits[0]).max()


def test_decode_steps_that_cannot_be_captured(gpu, capsys):
    """They run eagerly, as all shapes after them do, which is said once."""
    runner, gpu.refused = echoing(gpu), 0
    for count in (1, 2, 2):
        batch = batch_of(*[(1, 0)] * count)
        assert np.array_equal(runner.step(batch).logits()[:, :3], answer(batch, 0)[:, :3])
    assert "out of memory" in runner.uncaptured and not runner.uncaptured_prompts
    assert capsys.readouterr().err.count("decode steps run without CUDA graphs") == 1
    lockstep = echoing(gpu, lockstep=True)
    with pytest.raises(StepMemoryError):
        lockstep.step_padded(batch_of((1, 0)), StepShape(1, 1, 1, 1), decoding=True)
