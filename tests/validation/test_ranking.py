"""Ranking against a planted fault and transformers; recipes from the file to the weights of an engine."""

import json
import tomllib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.cli import main
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.quantization import Fp8
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation import ranking
from latentrt.validation.dequantize import StoredWeights
from latentrt.validation.errors import ValidationError
from latentrt.validation.judge.metrics import LogitComparison
from latentrt.validation.reference.model import Reference
from tests import checkpoints
from tests.conftest import EXAMPLE

PLANTED = "model.layers.1.self_attn.o_proj.weight"


def tokens(vocab_size: int, count: int = 48) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, vocab_size, count) for n in (1, 2)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Checkpoint:
    """A small model; one weight has a column of outliers beside which e4m3 holds nothing, and which meets zeros alone."""
    folder = checkpoints.write(tmp_path_factory.mktemp("planted") / "model", seed=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    config = Checkpoint(folder).config
    tensors[PLANTED][:, 0] = 1e7
    tensors[PLANTED.replace("o_proj", "kv_b_proj")][config.qk_nope_head_dim] = 0  # the first head's first value
    save_file({name: tensor.float() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def ranked(planted) -> ranking.Ranking:
    return ranking.Ranking(planted, Fp8(), tokens(planted.config.vocab_size), np.inf)


def test_a_weight_that_fp8_cannot_hold_ranks_first(ranked):
    costs = ranked.rank("tensor")
    assert costs[0].pattern == PLANTED.removesuffix(".weight") and costs[0].kl > 2 * costs[1].kl
    assert [c.kl for c in costs] == sorted((c.kl for c in costs), reverse=True)
    assert ranked.rank("layer")[0].pattern == "model.layers.1.*"
    assert ranked.rank("kind")[0].pattern == "model.layers.*.self_attn.o_proj"


def test_every_grouping_covers_all_that_is_quantized(ranked):
    expected = {w.name for w in ranked.weights if ranked.format.is_quantized(w)}
    for by in ranking.BY:
        assert {w.name for group in ranked.groups(by).values() for w in group} == expected


def test_nothing_quantized_costs_nothing_and_leaves_nothing_behind(ranked):
    before = ranked.cost([])
    ranked.rank("layer")
    assert before == (0.0, 1.0) == ranked.cost([])


def test_cost_is_that_of_transformers_on_the_same_weights(ranked, planted):
    """The whole set, quantized, in another implementation."""
    reference, comparison = Reference(planted), LogitComparison()
    windows = tokens(planted.config.vocab_size)
    expected = [reference.logits(window) for window in windows]
    values = []
    for weight in ranked.weights:
        value = weight.read(planted.read).float()
        if ranked.format.is_quantized(weight):
            value = ranked.format.decode(weight, ranked.format.encode(weight, value))
        values.append((weight, value))
    from latentrt.export.models import registry

    reference.use_weights(registry.of(planted.config).originals(values), "rounded weights")
    for window, logits in zip(windows, expected, strict=True):
        comparison.add(logits, reference.logits(window))
    kl, top1 = ranked.cost([w for group in ranked.groups("tensor").values() for w in group])
    assert kl == pytest.approx(comparison.summary()["kl_mean"], rel=1e-3)
    assert top1 == comparison.summary()["top1_agreement"]


def test_what_is_kept_pays_most_for_its_bytes():
    costs = [ranking.Cost("big", 1.0, 0.5, 100), ranking.Cost("small", 0.5, 0.5, 10), ranking.Cost("nothing", 0.0, 1.0, 1)]
    assert [c.pattern for c in ranking.chosen(costs, 1000, 1)] == ["small"]
    assert [c.pattern for c in ranking.chosen(costs, 1000, 11)] == ["small", "big"]
    assert ranking.chosen(costs, 1000, 0.5) == []


def test_a_model_that_memory_does_not_hold_is_refused(planted):
    with pytest.raises(ValidationError, match="takes about 0 GB of memory, 0 GB are free; rank on a larger machine"):
        ranking.Ranking(planted, Fp8(), [], 1000)


def test_from_the_ranking_to_an_engine(capsys, tmp_path, fast_trace):
    """The recipe that rank writes is what build reads; what it names is stored as it was, to the bit."""
    recipe, out = tmp_path / "plain.toml", tmp_path / "bundle"
    options = ["--precision", "int8", "--by", "kind", "--tokens", "64", "--grow", "30", "--recipe", str(recipe), "--json"]
    assert main(["rank", str(EXAMPLE), *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    plain = tomllib.loads(recipe.read_text())["plain"]
    assert plain == answer["recipe"]["plain"] and plain
    assert answer["recipe"]["kl"] < answer["all"]["kl"] and answer["recipe"]["grows"] <= 0.3 * answer["weight_bytes"]
    assert main(["build", str(EXAMPLE), "--out", str(out), "--precision", "int8", "--recipe", str(recipe), "--json"]) == 0
    stored, opened = StoredWeights(Bundle(out)), Checkpoint(EXAMPLE)
    changed = 0
    for weight, original in zip(stored.weights, opened.weights(False), strict=True):
        same = torch.equal(stored.decode(weight), original.read(opened.read).float())
        assert same or stored.format.is_quantized(weight), weight.name
        changed += not same
    assert 0 < changed < len(stored.weights)
    assert next(iter(Bundle(out).manifest.weight_sets.values())).format.plain_modules == plain


@pytest.mark.parametrize(("options", "words"), [
    (["--precision", "bf16"], "--precision is 'bf16', accepted: fp8, int8, int4"),
    (["--by", "head"], "--by is 'head', accepted: tensor, kind, layer"),
    (["--grow", "-1"], "--grow is -1, accepted: 0 to 1000"),
    (["--recipe", "no/such/r.toml"], "no/such is not a folder"),
    (["--recipe", str(EXAMPLE / "config.json")], "is there already; name a new file"),
])  # fmt: skip
def test_wrong_options_are_refused_by_name(capsys, options, words):
    assert main(["rank", str(EXAMPLE), *options]) == 2
    assert words in capsys.readouterr().err
