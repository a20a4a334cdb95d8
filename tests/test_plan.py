"""The planner against numbers worked out by hand, published ones, and the files of a real bundle."""

import json
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.errors import UserError
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.export.quantization import BFloat16, Fp8
from latentrt.planning import gpus, paper, plan, sizes
from latentrt.planning.roofline import USABLE, Deployment
from latentrt.planning.sizes import Model
from latentrt.plugins import cache_formats
from latentrt.runtime.bundle.reader import Bundle
from tests import planned
from tests.conftest import EXAMPLE
from tests.planned import V2

LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
}  # fmt: skip


def model(raw: dict = V2, **changes) -> Model:
    return Model.of(registry.parse(raw | changes))


def deployment(raw: dict = V2, gpu: str = "H800", count: int = 8, cache: str = "bfloat16", weights=None) -> Deployment:
    return Deployment(model(raw), gpus.GPUS[gpu], count, weights or Fp8(), cache)


def run(capsys, *arguments) -> tuple[int, str, str]:
    return planned.run(capsys, "plan", *arguments)


@pytest.fixture
def config(tmp_path):
    return planned.config_file(tmp_path)


def test_parameters_are_the_published_ones():
    """arXiv 2405.04434: 236 B of which 21 B for each token, V2-Lite 15.7 B and 2.4 B, where the embedding cannot count."""
    assert (round(model().parameters.total / 1e9), round(model().active / 1e9)) == (236, 21)
    lite, embedding = model(LITE), 102400 * 2048
    assert round(lite.parameters.total / 1e9, 1) == 15.7 and abs((lite.active - embedding) / 1e9 - 2.4) < 0.06
    routed = 59 * 160 * 3 * 5120 * 1536  # layers with experts, experts, matrices
    assert model().parameters.routed == routed


def test_the_cache_that_is_saved_follows_from_dimensions():
    """DeepSeek 67B: 95 layers with 8 key and value heads of 128 in 16 bits; V2: 60 layers of 576 elements."""
    gqa = 95 * 2 * 8 * 128 * 16
    assert paper.DEEPSEEK_67B.cache_bytes * 8 == gqa
    claims = paper.claims(model())
    assert claims["cache_saved"]["6 bits"] == pytest.approx(1 - 60 * 576 * 6 / gqa)
    found = {name: round(100 * saved, 1) for name, saved in claims["cache_saved"].items()}
    assert (found["6 bits"], found["int6r"], found["bfloat16"]) == (93.3, 93.3, 82.2)
    assert claims["cache_saved"]["int6r"] == pytest.approx(1 - 60 * 436 * 8 / gqa)


def test_67b_has_as_many_parameters_as_its_name_says():
    assert round(paper.DEEPSEEK_67B.parameters / 1e9) == 67


def test_the_papers_throughput_lies_among_those_of_its_possible_contexts():
    ratios = [row["ratio"] for row in paper.claims(model())["ratios"]]
    assert min(ratios) < 5.76 < max(ratios)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_weight_bytes_are_those_of_a_build(precision, traced, tmp_path):
    path = traced.build_once(f"plan.{precision}", EXAMPLE, tmp_path / "bundle", "cpu", precision)
    bundle, opened = Bundle(path), Checkpoint(EXAMPLE)
    (stored,) = bundle.manifest.weight_sets.values()
    planned = Model.of(opened.config).weight_bytes(sizes.formats(Model.of(opened.config))[precision])
    kinds = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}
    held = {name: prod(tensor.shape) * kinds[tensor.dtype] for name, tensor in stored.tensors.items()}
    assert planned.total == sum(held.values())
    assert planned.routed == sum(size for name, size in held.items() if ".mlp.experts." in name)


@pytest.mark.parametrize("name", cache_formats.NAMES)
def test_cache_bytes_are_those_of_a_page(name):
    layout = cache_formats.get(name)
    page = layout.width(512, 64) * {"int32": 4, "float32": 4, "float16": 2, "bfloat16": 2}[layout.element]
    assert model(LITE).cache_bytes(name) == 27 * page


def test_what_fits_on_a_4090_by_hand():
    """V2-Lite in FP8: 0.9 of 24 GB less the weights and what the experts need, by 31,104 bytes a token."""
    found = deployment(LITE, "RTX 4090", 1)
    weights = model(LITE).weight_bytes(Fp8()).total
    pairs = 2048 * 6  # of a row and an expert; bfloat16 of both products, and FP8 of what goes into them
    workspace = pairs * (1408 * 2 + 2048 * 2) + 2048 * 2048 + pairs * 1408
    assert found.workspace == pytest.approx(workspace, rel=0.002)  # indices and scales come on top
    assert found.capacity == int((0.9 * 24e9 - weights - found.workspace) // (27 * 576 * 2))
    assert found.largest_batch(8192) == found.capacity // 8192
    assert (found.fewest(8192), deployment(LITE, "RTX 3090", 1, weights=BFloat16()).fewest(8192)) == (1, 2)


@pytest.mark.parametrize(("rows", "megabytes"), [(2048, 193), (16384, 1544)])
def test_workspace_of_gathered_rows_by_hand(rows, megabytes):
    """V2: 6 experts a row, 1,536 and 5,120 elements in bfloat16, and 5,120 a row and 1,536 an expert in FP8."""
    by_hand = rows * 6 * (1536 * 2 + 5120 * 2 + 1536) + rows * 5120
    found = model().workspace_bytes(Fp8(), rows)
    assert found == pytest.approx(by_hand, rel=0.002)  # indices and scales come on top
    assert round(found / 1e6) == megabytes


def test_int4_experts_are_multiplied_in_bfloat16():
    """fp8-int4: half a byte a weight and float32 scales; rows go in twice, in bfloat16 and as halves; no product is in FP8."""
    int4, fp8 = sizes.formats(model())["fp8-int4"], Fp8()
    routed = 59 * 160 * 3 * 5120 * 1536
    assert model().weight_bytes(int4).routed == routed / 2 + routed / 128 * 4
    assert model().operations(int4)["routed"] == (0, 2 * routed * 6 / 160)
    assert model().operations(int4)["rest"] == model().operations(fp8)["rest"]
    by_hand = 2048 * 6 * (1536 * 2 + 5120 * 2) + 2048 * 5120 * 2
    assert model().workspace_bytes(int4, 2048) == pytest.approx(by_hand, rel=0.002)  # indices come on top
    assert model().workspace_bytes(sizes.formats(model())["bf16-int4"], 2048) == model().workspace_bytes(int4, 2048)


def test_a_model_without_experts_needs_no_workspace():
    assert model(LITE, first_k_dense_replace=27).workspace_bytes(Fp8(), 2048) == 0


def test_memory_of_a_rank_by_hand():
    """8 H800: an eighth of the experts, all else, the workspace of 2,048 gathered rows, and cache."""
    found, size = deployment(cache="int6r"), model().weight_bytes(Fp8())
    assert found.limits.max_batch_tokens == 2048 // 8
    left = 0.9 * 80e9 - size.embedding - size.rest - size.routed / 8 - model().workspace_bytes(Fp8(), 2048)
    assert found.left == left and found.capacity == 8 * int(left // (60 * 436))


def test_only_divisors_of_the_experts_can_share_them(capsys, config):
    found = json.loads(run(capsys, config, "--gpus", 8, "--target", "H200", "--cache-format", "int6r", "--json")[1])
    fp8, bf16 = (next(row for row in found["ranks"] if row["precision"] == name) for name in ("fp8", "bf16"))
    assert [row["precision"] for row in found["ranks"]] == ["fp8", "bf16", "fp8-int4", "bf16-int4"]
    counts = [int(n) for n in fp8["by_count"]]
    assert counts == [n for n in range(1, 161) if 160 % n == 0]
    fits = {row["precision"]: [n for n in counts if row["by_count"][str(n)]["cache_tokens"]] for row in found["ranks"]}
    assert (fits["fp8"][0], fits["bf16"][0]) == (2, 5)
    held = bf16["by_count"]["8"]
    parts = bf16["replicated_bytes"], *(held[f"{part}_bytes"] for part in ("experts", "workspace", "cache"))
    assert sum(parts) == pytest.approx(0.9 * 141e9)
    assert bf16["replicated_bytes"] + 8 * held["experts_bytes"] == pytest.approx(2 * model().parameters.total)


def test_a_decode_step_by_hand():
    """8 H800, 80 sequences of 1,000 tokens, bfloat16: every GPU reads its weights, the chosen experts and 10 caches."""
    c, plain = model(), deployment(weights=BFloat16())
    step, size = plain.decode(80, 1000), c.weight_bytes(BFloat16())
    touched = 1 - (1 - 6 / 160) ** 80
    assert step.weights == pytest.approx((size.rest + size.routed / 8 * touched) / 3.35e12)
    assert step.cache == pytest.approx(10 * 1000 * 60 * 576 * 2 / 3.35e12)
    products = c.active - 102400 * 5120  # the embedding is looked up
    attention = 1000 * 60 * 128 * 2 * (512 + 64 + 512)
    assert step.compute == pytest.approx(10 * (2 * products + attention) / 989e12)
    assert step.seconds == max(step.weights + step.cache, step.compute)


def test_a_prompt_by_hand():
    """One prompt of 4,096 tokens: products in FP8 but for w_uk, w_uv, router and head, attention over pairs of 192 and 128."""
    c, n = model(), 4096
    one = deployment(count=1)
    absorbed, router, head = 60 * 128 * 512 * (128 + 128), 59 * 160 * 5120, 102400 * 5120
    norms = sum(prod(w.shape) for w in c.weights if w.role == "norm")
    quantized = c.active - 2 * head - absorbed - router - norms
    attention = n * (n + 1) / 2 * 60 * 128 * 2 * (192 + 128)
    expected = 2 * n * quantized / 1979e12 + (2 * n * (absorbed + router + norms) + 2 * head + attention) / 989e12
    assert one.prefill(n).compute == pytest.approx(expected)


@given(batch=st.integers(1, 500), context=st.integers(1, 100_000), cache=st.sampled_from(cache_formats.NAMES))
def test_more_work_takes_no_less_time(batch, context, cache):
    found = deployment(cache=cache)
    step = found.decode(batch, context)
    assert found.decode(batch + 1, context).seconds >= step.seconds
    assert found.decode(batch, context + 1).seconds >= step.seconds
    assert step.bound in ("weights", "cache", "compute")
    fits = found.largest_batch(context)
    held = -(-fits // found.count) * context * found.model.cache_bytes(cache) + found.held
    assert held <= USABLE * 80e9 or fits == 0


def test_fewer_bits_hold_more_tokens():
    held = [deployment(cache=name).capacity for name in ("float32", "bfloat16", "fp8", "int6", "int6r", "int4")]
    assert held == sorted(held) and len(set(held)) == len(held)


def test_as_many_gpus_as_it_says_hold_it():
    found = deployment(count=8)
    fewest = found.fewest(16384)
    assert deployment(count=fewest).largest_batch(16384) >= fewest
    assert deployment(count=fewest - 1).largest_batch(16384) == 0


def test_json(capsys, config):
    code, out, _ = run(capsys, config, "--target", "H100", "--gpus", 8, "--context", 16384, "--paper", "--json")
    found = json.loads(out)
    (row,) = found["gpus"]
    assert code == 0 and (row["name"], row["precision"]) == ("H100", "fp8")
    assert row["largest_batch"] == 8 * (row["cache_tokens"]["bfloat16"] // 8 // 16384)
    assert row["decode"]["1"]["bound"] == "weights" and found["paper"]["ratio_paper"] == 5.76
    assert set(found["caches"]) == set(cache_formats.NAMES)


def test_tables_name_every_gpu_and_fit_120_columns(capsys, config):
    code, out, _ = run(capsys, config.parent, "--gpus", 8, "--paper", "--cache-format", "int6r")
    assert code == 0 and all(name in out for name in gpus.GPUS)
    assert max(map(len, out.splitlines())) <= 120
    assert "93.28%" in out and "5.76" in out


def test_a_checkpoint_will_do_as_well(capsys, tiny_checkpoint):
    code, out, _ = run(capsys, tiny_checkpoint, "--json", "--target", "4090")
    found = json.loads(out)
    assert code == 0 and found["gpus"][0]["name"] == "RTX 4090"
    assert found["model"]["layers"] == Checkpoint(tiny_checkpoint).config.num_hidden_layers


def test_plot(capsys, config, tmp_path):
    assert run(capsys, config, "--gpus", 8, "--target", "H100", "--target", "sm120", "--plot", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("options", "words"), [
    (["--target", "cpu"], "--target is 'cpu', accepted: sm86"),
    (["--gpus", "0"], "--gpus is 0, accepted: 1 or more"),
    (["--gpus", "3"], "--gpus is 3, accepted: 1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 80, 160 (divisors of n_routed_experts"),
    (["--context", "999999"], "--context is 999999, accepted: 1 to 163840"),
    (["--cache-format", "int5"], "--cache-format is 'int5', accepted: float32"),
    (["--plot", "p.jpg"], "accepted: a file that ends in .png or .svg"),
    (["--target", "RTX4090", "--plot", "p.png"], "fits none of these GPUs, 1 of each; give more with --gpus"),
    (["--target", "H100", "--gpus", "8", "--plot", "no/such/p.png"], "no/such/p.png cannot be written (No such file"),
])  # fmt: skip
def test_wrong_options_are_refused_by_name(capsys, config, options, words):
    code, _, err = run(capsys, config, *options)
    assert code == 2 and words in " ".join(err.split())


@pytest.mark.parametrize(("content", "words"), [
    ("{", "config.json: not valid JSON"),
    ('{"model_type": "llama"}', "config.json: model_type is 'llama', accepted: 'deepseek_v2'"),
])  # fmt: skip
def test_wrong_configs_are_refused_by_name(capsys, config, content, words):
    config.write_text(content)
    code, _, err = run(capsys, config)
    assert code == 2 and words in err


def test_a_folder_without_a_model_is_refused(capsys, tmp_path):
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "config.json: not found" in err
    code, _, err = run(capsys, tmp_path / "nowhere.json")
    assert code == 2 and "nowhere.json" in err


def test_a_cache_that_the_model_does_not_fit_is_refused():
    odd = registry.parse(V2 | {"kv_lora_rank": 20})
    with pytest.raises(UserError, match=r"cache format 'int6' at kv_lora_rank 20, .*: it takes a kv_lora_rank that 32 divides"):
        plan.plan(odd, gpus.chosen(None), 1, None, "int6")
    assert set(plan.plan(odd, gpus.chosen(None), 1, None, "bfloat16")["caches"]) == {"float32", "float16", "bfloat16"}
