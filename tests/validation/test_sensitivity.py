"""The ranking of weights: against a forward pass written out here, with a planted outlier, and what a recipe of it does."""

import json

import numpy as np
import pytest
import torch

from latentrt import cli
from latentrt.export import recipe as recipes
from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.export.quantization import Fp8, Int4, Int8
from latentrt.validation import sensitivity
from latentrt.validation.reference.model import Reference
from latentrt.validation.sensitivity import Sensitivity, format_of, groups, plain_bytes
from tests import checkpoints
from tests.conftest import EXAMPLE, TINY, save_tokenizer

PLANTED = "model.layers.1.self_attn.o_proj"
WINDOWS = [np.random.default_rng(n).integers(2, TINY["vocab_size"], n) for n in (40, 17)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A random model in which one tensor's rows have an element a hundred times the others, times inputs that are nearly 0."""
    folder = checkpoints.write(tmp_path_factory.mktemp("planted") / "checkpoint", **TINY)

    def plant(tensors: dict) -> None:
        tensors[f"{PLANTED}.weight"][:, 3] = 60.0
        kv_b = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
        kv_b.view(4, -1, kv_b.shape[1])[0, 12 + 3] *= 1e-3  # head 0's value 3, which o_proj's column 3 reads

    return save_tokenizer(checkpoints.edit_tensors(folder, plant))


def expected_kl(folder, weight_format, modules) -> float:
    """By transformers, on weights that were rounded one by one."""
    checkpoint = Checkpoint(folder)
    reference = Reference(checkpoint)
    exact = [reference.logits(window) for window in WINDOWS]
    pairs = [(w, w.read(checkpoint.read).float()) for w in checkpoint.weights()]
    rounded = [(w, weight_format.decode(w, weight_format.encode(w, v)) if w.module in modules else v) for w, v in pairs]
    reference.use_weights(registry.of(checkpoint.config).originals(rounded), "rounded")
    found = [reference.logits(window) for window in WINDOWS]
    p, q = (torch.from_numpy(np.concatenate(x)).double().log_softmax(-1) for x in (exact, found))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("weight_format", [Fp8(), Int8(), Int4(16)], ids=lambda f: f.name)
def test_the_cost_is_that_of_transformers_with_the_same_weights_rounded(weight_format, tiny_checkpoint):
    model = Sensitivity(Checkpoint(tiny_checkpoint), WINDOWS, weight_format)
    found = groups(model.weights, weight_format, "tensor")
    for modules in ({m for g in found for m in g.modules}, {"model.layers.2.mlp.experts"}, {"model.layers.0.mlp.up_proj"}):
        expected = expected_kl(tiny_checkpoint, weight_format, modules)
        assert model.cost(modules).kl == pytest.approx(expected, rel=0.05, abs=1e-9)
        assert expected > 1e-7


def test_nothing_rounded_costs_nothing_and_weights_come_back(tiny_checkpoint):
    model = Sensitivity(Checkpoint(tiny_checkpoint), WINDOWS, Int8())
    before = {name: p.clone() for name, p in model.parameters.items()}
    assert model.cost([]) == sensitivity.Cost(0.0, 1.0)
    assert model.cost(["lm_head", "model.layers.1.self_attn.kv_b_proj"]).kl > 0
    assert all(torch.equal(p, before[name]) for name, p in model.parameters.items())
    assert model.cost([]) == sensitivity.Cost(0.0, 1.0)


@pytest.mark.parametrize("by", ["layer", "kind", "tensor"])
def test_a_planted_outlier_ranks_first(planted, by):
    model = Sensitivity(Checkpoint(planted), WINDOWS, Int8())
    ranked = sensitivity.rank(model, groups(model.weights, model.format, by))
    assert PLANTED in ranked[0].group.modules
    assert [r.cost.kl for r in ranked] == sorted((r.cost.kl for r in ranked), reverse=True)
    chosen = sensitivity.within(model, ranked, 0.5 * model.cost([m for r in ranked for m in r.group.modules]).kl)
    assert PLANTED in [m for r in chosen for m in r.group.modules] and len(chosen) < len(ranked)


def test_groups_are_patterns_of_recipes(tiny_checkpoint, tmp_path):
    """Every pattern chooses its own group's modules, and all groups together each quantized module once."""
    weights = Checkpoint(tiny_checkpoint).weights()
    for precision in recipes.QUANTIZED_ROLES:
        for by in sensitivity.BY:
            found = groups(weights, format_of(precision, weights), by)
            modules = [m for g in found for m in g.modules]
            assert sorted(modules) == sorted(recipes.quantizable(weights, precision))
            for group in found:
                recipes.write(tmp_path / "r.toml", [group.pattern], ["a comment"])
                chosen = recipes.read(tmp_path / "r.toml").modules(weights, [precision])[precision]
                assert set(chosen) == set(group.modules), group.pattern


@pytest.mark.parametrize("weight_format", [Fp8(), Int8(), Int4(16)], ids=lambda f: f.name)
def test_the_bytes_of_keeping_are_those_of_the_files(weight_format, tiny_checkpoint):
    """But for gaps between tensors and the files' headers, which are 256 bytes and a few hundred at most."""
    weights = Checkpoint(tiny_checkpoint).weights()
    for group in groups(weights, weight_format, "layer"):
        kept = weight_format.keeping(group.modules)
        sizes = [sum(weight_set.planned_bytes(weights, f).values()) for f in (weight_format, kept)]
        assert abs(sizes[1] - sizes[0] - plain_bytes(weights, weight_format, group.modules)) < 256 * 40


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["rank", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_writes_a_recipe_that_does_what_it_says(planted, tmp_path, capsys):
    file = tmp_path / "r.toml"
    status, out, _ = run(
        capsys, planted, "--precision", "int8", "--by", "tensor", "--tokens", 60, "--recipe", file, "--keep", 2, "--json"
    )
    found = json.loads(out)
    assert status == 0 and found["ranked"][0]["pattern"] == PLANTED and "pseudo-random" in found["tokens"]
    assert found["recipe"]["plain"] == [r["pattern"] for r in found["ranked"][:2]]
    assert found["recipe"]["kl"] < 0.5 * found["all"]["kl"]
    assert found["recipe"]["plain_bytes"] == sum(r["plain_bytes"] for r in found["ranked"][:2])
    assert recipes.read(file).patterns == tuple(found["recipe"]["plain"])


def test_the_command_shows_a_table_and_keeps_within_a_budget(capsys, tmp_path):
    """On the example, by layer, in seconds: the budget is half of what fp8 costs."""
    file = tmp_path / "r.toml"
    status, out, _ = run(capsys, EXAMPLE, "--tokens", 128, "--recipe", file, "--budget", 0.0008)
    assert status == 0 and "model.layers.0.*" in out and "all together: mean KL" in out and file.exists()
    with_recipe = float(out.rsplit("mean KL ", 1)[1].split(",")[0])
    assert with_recipe <= 0.0008
    status, out, _ = run(capsys, EXAMPLE, "--tokens", 128, "--recipe", tmp_path / "none.toml", "--budget", 1)
    assert status == 0 and "not written" in out and not (tmp_path / "none.toml").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--precision", "bf16"], "precision is 'bf16', accepted: fp8, int8, int4, fp8-int4, bf16-int4"),
    (["--by", "head"], "by is 'head', accepted: layer, kind, tensor"),
    (["--keep", 2], "--keep says what a recipe keeps"),
    (["--recipe", "r.toml"], "needs one of --keep and --budget, found neither"),
    (["--recipe", "r.toml", "--keep", 2, "--budget", 1], "found --keep and --budget"),
    (["--recipe", "none/r.toml", "--keep", 2], "in a folder that is not there"),
    (["--recipe", "r.toml", "--keep", 0], "--keep is 0, accepted: 1 or more"),
    (["--recipe", "r.toml", "--budget", -1], "--budget is -1.0, accepted: 0 or more"),
    (["--tokens", 3], "--tokens is 3"),
])  # fmt: skip
def test_what_the_command_refuses(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, EXAMPLE, *arguments)
    assert status == 2 and words in err and list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(capsys, monkeypatch):
    monkeypatch.setattr("latentrt.validation.stages.engine_graph.free_memory", lambda device: 2e7)
    monkeypatch.setattr(Checkpoint, "read", lambda *args: pytest.fail("a tensor was read"))
    status, _, err = run(capsys, EXAMPLE)
    assert status == 2 and "ranking takes about 0.1 GB of memory" in err and "fewer --tokens" in err
