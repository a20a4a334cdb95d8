"""Tolerances from the emulation: right engines of every format pass twice alike, the twelve defects fail, and the numbers are
those of something independent: transformers, exact fractions, simulations."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.validation.calibration.expected import PLAIN, Alone, expect
from latentrt.validation.calibration.sweep import Run, Sweep
from latentrt.validation.compare import Comparison
from latentrt.validation.judge import metrics
from latentrt.validation.judge.paired import Paired, largest_error
from latentrt.validation.judge.statistics import binomial_tail, paired_test, standard_error
from latentrt.validation.reference import model
from latentrt.validation.reference.arithmetic import Exact
from latentrt.validation.reference.model import Reference
from latentrt.validation.stages.base import Force
from latentrt.validation.validate import validate
from tests import checkpoints
from tests.conftest import EXAMPLE
from tests.validation.defects import TWELVE
from tests.validation.test_bisect import CPU

pytestmark = pytest.mark.slow

TOKENS = 300


def deep(*case):
    return pytest.param(*case, marks=pytest.mark.deep)


FEW = [*CPU[:4], *(deep(*case) for case in CPU[4:])]
ON_TORCH = {"backend": "torch", "device": "cpu"}


@pytest.fixture
def engine_alone(monkeypatch):
    """Torch model and exported graph know nothing of the bundle, and the reference's audit has tests of its own."""
    monkeypatch.setattr(Comparison, "_early_stages", lambda self: None)
    monkeypatch.setattr(model, "audit", lambda config, raw: [])


def judged(bundle, checkpoint, target=None, count=TOKENS, **options) -> dict:
    return validate(bundle, checkpoint, target, count=count, **options)[0]


def passes_twice(bundle, checkpoint, *arguments, **options) -> None:
    """With the same numbers. What is found is near what is expected, where a format rounds."""
    first, second = (judged(bundle, checkpoint, *arguments, **options) for _ in range(2))
    assert first["verdict"] == "pass", first["first_failure"]
    assert first["checks"] == second["checks"]
    assert len([c for c in first["checks"] if c["expected"] is not None and c["limit"] is not None]) >= 6
    for alone in first["alone"]["engine"]:
        found, expected = (alone["spread"][name]["whole"] for name in ("found", "expected"))
        assert expected < 1e-4 or found == pytest.approx(expected, rel=0.15), alone


@pytest.mark.parametrize(("precision", "accuracy", "cache_format"), FEW)
def test_a_right_engine_passes_twice(traced, tiny_checkpoint, tmp_path, engine_alone, precision, accuracy, cache_format):
    options = {"precision": precision, "accuracy": accuracy, "cache_format": cache_format}
    name = f"tiny.{precision}.{accuracy}.{cache_format}"
    passes_twice(traced.build_once(name, tiny_checkpoint, tmp_path / "bundle", "cpu", **options), tiny_checkpoint)


@pytest.mark.parametrize("cache_format", ["int6r", *map(deep, ("bfloat16", "fp8", "int6", "int4"))])
def test_a_right_engine_in_bf16_passes_twice(traced, tiny_checkpoint, tmp_path, engine_alone, cache_format):
    options = {"precision": "bf16", "cache_format": cache_format}
    path = traced.build_once(f"tiny.torch.{cache_format}", tiny_checkpoint, tmp_path / "bundle", "torch", **options)
    passes_twice(path, tiny_checkpoint, **ON_TORCH)


@pytest.mark.deep
@pytest.mark.parametrize("precision", ["fp8-int4", "bf16-int4"])
def test_right_experts_of_4_bits_pass_twice(traced, stand_ins, tmp_path, engine_alone, precision):
    with stand_ins():
        path = traced.build_once(f"example.gpu.{precision}", EXAMPLE, tmp_path / "bundle", "sm89", precision=precision)
    passes_twice(path, EXAMPLE, **ON_TORCH)


@pytest.mark.parametrize("target", ["sm86", "sm89"])
def test_right_graphs_for_gpus_pass_twice(gpu_bundle, engine_alone, target):
    passes_twice(gpu_bundle, EXAMPLE, target, **ON_TORCH)


@pytest.mark.parametrize("name", TWELVE)
def test_a_defect_fails(name, request, tiny_checkpoint, engine_alone, monkeypatch):
    """By a check of the engine's own."""
    defect = TWELVE[name]
    bundle = request.getfixturevalue(defect.bundle)
    defect.inject(bundle, monkeypatch)
    checkpoint = EXAMPLE if defect.bundle == "gpu_copy" else tiny_checkpoint
    evidence = judged(bundle, checkpoint, defect.target, **({} if defect.bundle == "copied" else ON_TORCH))
    failed = [c for c in evidence["checks"] if not c["passed"] and c["stage"] in ("engine", "weights")]
    assert evidence["verdict"] == "fail" and failed, name


# -- the sweep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True}])
def test_an_exact_sweep_is_transformers_model(tmp_path, fields):
    """Two windows at once, one of them twice, the second time each layer alone with the routing given."""
    checkpoint = Checkpoint(checkpoints.write(tmp_path / "checkpoint", **fields))
    windows = [np.random.default_rng(k).integers(0, 101, n) for k, n in enumerate((40, 23))]
    reference = Reference(checkpoint)
    traces = [reference.trace(w) for w in windows]
    force = Force(traces[0].routing, traces[0].hidden)
    math = Exact({w.name: w for w in checkpoint.weights()}, checkpoint.read)
    with torch.no_grad():
        sweep = Sweep(checkpoint, math, torch.float32, [*map(Run, windows), Run(windows[0], force)])
        for layer in range(checkpoint.config.num_hidden_layers):
            found = sweep.layer(layer)
            for part, trace in zip(sweep.parts, (*traces, traces[0]), strict=True):
                for name in ("attention", "mlp", "hidden"):
                    assert metrics.relative_error(getattr(trace, name)[layer], found[name][part].numpy()) < 5e-6, (layer, name)
        for run, trace in enumerate((*traces, traces[0])):
            assert np.abs(sweep.logits(run) - trace.logits).max() < 1e-4


def test_other_routing_is_taken(tiny_checkpoint):
    """A layer alone with other experts and weights is not what it is with its own; free windows beside it are as before."""
    checkpoint = Checkpoint(tiny_checkpoint)
    window = np.arange(30)
    trace = Reference(checkpoint).trace(window)
    other = {k: type(r)(r.router_input, r.router_logits, (r.ids + 1) % 8, 2 * r.weights) for k, r in trace.routing.items()}
    alone = Alone(window, Force(other, trace.hidden), {"engine": trace})
    given = expect(checkpoint, PLAIN, [window], alone)
    free = expect(checkpoint, PLAIN, [window])
    errors = {(s.layer, s.tensor): s.spread.found.whole for s in given.spreads["engine"]}
    assert errors[1, "attention"] < 1e-5 < 0.1 < errors[1, "mlp"]
    np.testing.assert_allclose(given.logits(0), free.logits(0), atol=1e-4)


# -- statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tries", "chance", "least"), [(5, 0.5, 4), (30, 2 / 3, 25), (400, 2 / 3, 330), (7, 0.25, 0)])
def test_the_binomial_tail_is_that_of_fractions(tries, chance, least):
    p = Fraction(chance).limit_denominator(12)
    exact = sum(math.comb(tries, k) * p**k * (1 - p) ** (tries - k) for k in range(least, tries + 1))
    assert binomial_tail(tries, chance, least) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_the_paired_test_keeps_its_error_rate(shared):
    """2,000 texts of 300 tokens whose engine errs exactly twice as often as the emulation, whatever share of errors is common:
    at a rate of 5 % no more than that fail."""
    rng, failed = np.random.default_rng(0), 0
    for _ in range(2000):
        u, v = rng.random((2, 300))
        other = u < 0.05
        found = np.where(u < 0.05 * shared, True, v < (0.1 - 0.05 * shared) / (1 - 0.05 * shared))
        failed += paired_test(found, other, 2.0) < 0.05
    assert failed <= 2000 * 0.05


def test_the_paired_test_finds_what_errs_more():
    rng = np.random.default_rng(0)
    other, found = rng.random(4096) < 0.02, rng.random(4096) < 0.15
    assert paired_test(found, other, 2.0) < 1e-6 < paired_test(other, other, 2.0)


def test_the_standard_error_of_neighbours_that_are_alike():
    """Against the spread of the mean over 400 simulated texts, each token half of the one before."""
    rng, means, errors = np.random.default_rng(0), [], []
    for _ in range(400):
        values = np.zeros(2048)
        for k, noise in enumerate(rng.normal(size=2048)):
            values[k] = 0.5 * values[k - 1] + noise
        means.append(values.mean())
        errors.append(standard_error(np.split(values, 4)))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert np.std(means) > 1.7 * 1.15 / 2048**0.5  # tokens taken one by one would say 1.15 / sqrt(2048)


def test_limits_do_not_depend_on_what_is_found():
    rng, window = np.random.default_rng(0), np.arange(200) % 50
    reference = rng.normal(size=(200, 50))
    emulated = reference + 0.01 * rng.normal(size=reference.shape)
    limits = []
    for scale in (0.01, 1.0):
        pairs = Paired()
        pairs.add(window, reference, reference + scale * rng.normal(size=reference.shape), emulated, slice(None))
        limits.append(pairs.kl_tolerance().limit)
        assert (pairs.kl_ratio() < 1) == (scale == 0.01)
    assert limits[0] == limits[1]


def test_a_few_tokens_that_flip_do_not_widen_the_limit_of_a_logit():
    errors = np.abs(np.random.default_rng(0).normal(1e-5, 1e-6, 1000))
    flipped = errors.copy()
    flipped[:20] = 1.0
    assert largest_error([flipped]).limit < 3 * largest_error([errors]).limit < 1e-3
