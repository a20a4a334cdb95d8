"""config.json: the family's real files, RoPE's numbers against two independent sources, and every kind of bad field."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.export.errors import ConfigError
from latentrt.export.models import registry
from latentrt.export.models.deepseek_v2.config import DEFAULTS
from latentrt.export.models.registry import parse
from latentrt.validation.reference import formulas
from tests import checkpoints, formula

CONFIGS = Path(__file__).parent.parent / "configs"
V2 = json.loads((CONFIGS / "v2.json").read_text())
LITE = json.loads((CONFIGS / "v2_lite.json").read_text())
# Sizes from the paper, arXiv 2405.04434 section 3.1.2 and appendix B: layers, hidden, heads, query rank, experts, dense FFN.
PUBLISHED = {
    "v2": (60, 5120, 128, 1536, 160, 12288), "v2_5": (60, 5120, 128, 1536, 160, 12288),
    "coder_v2": (60, 5120, 128, 1536, 160, 12288), "v2_lite": (27, 2048, 16, None, 64, 10944),
    "coder_v2_lite": (27, 2048, 16, None, 64, 10944),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_configs_parse(name):
    c = parse(json.loads((CONFIGS / f"{name}.json").read_text()))
    found = c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.q_lora_rank, c.n_routed_experts, c.intermediate_size
    assert found == PUBLISHED[name]
    big = name in ("v2", "v2_5", "coder_v2")
    assert (c.topk_method, c.routed_scaling_factor) == (("group_limited_greedy", 16.0) if big else ("greedy", 1.0))
    assert (c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim) == (512, 128, 64, 128)
    assert c.rope.rope_type == "yarn" and c.rope.factor == 40 and not c.norm_topk_prob


ROPES = st.fixed_dictionaries({
    "rope_type": st.just("yarn"), "rope_theta": st.sampled_from([10000.0, 500.0, 1e6]),
    "factor": st.floats(1, 64), "original_max_position_embeddings": st.sampled_from([16, 300, 4096]),
    "beta_fast": st.sampled_from([32.0, 8.0]), "beta_slow": st.sampled_from([1.0, 2.5]),
    "mscale": st.sampled_from([None, 0.707, 1.0]), "mscale_all_dim": st.sampled_from([None, 0.0, 0.707, 1.0]),
})  # fmt: skip


def transformers_rope(raw: dict) -> tuple[torch.Tensor, float]:
    from transformers import DeepseekV2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = DeepseekV2Config(**raw)
    return ROPE_INIT_FUNCTIONS["yarn"](own, "cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ROPES, st.sampled_from([4, 8, 10, 64]))
def test_rope_equals_transformers_and_the_formula(rope, dim):
    raw = checkpoints.CONFIG | {"model_type": "deepseek_v2", "rope_parameters": rope, "qk_rope_head_dim": dim}
    c = parse({k: v for k, v in raw.items() if k != "rope_theta"})
    frequencies, factor = transformers_rope(raw)
    # float32 frequencies: a relative step of 1.2e-7, and powf and the ramp round a few times
    np.testing.assert_allclose(c.rope.inv_freq(dim), frequencies.numpy(), rtol=2e-6)
    assert c.rope.attention_factor == pytest.approx(factor, rel=1e-12)
    np.testing.assert_allclose(c.rope.inv_freq(dim), formula.inv_freq(raw), rtol=1e-12)
    assert c.softmax_scale == pytest.approx(formula.softmax_scale(raw), rel=1e-12)
    if bool(rope["mscale"]) == bool(rope["mscale_all_dim"]):
        assert c.rope.attention_factor == pytest.approx(formula.attention_factor(raw), rel=1e-12)


def test_softmax_scale_of_v2_is_the_published_number():
    """192^-0.5 * (0.1 * 0.707 * ln 40 + 1)^2, worked out by hand: ln 40 = 3.68888, mscale = 1.260804."""
    assert parse(V2).softmax_scale == pytest.approx(0.0721687836 * 1.2608038 * 1.2608038, rel=1e-6)


def test_softmax_scale_equals_transformers():
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

    own = DeepseekV2Config(**checkpoints.CONFIG)
    c = parse(checkpoints.CONFIG | {"model_type": "deepseek_v2"})
    assert c.softmax_scale == pytest.approx(DeepseekV2Attention(own, 0).scaling, rel=1e-12)


def spelled(**fields) -> dict:
    """V2's config with its RoPE replaced; `...` takes a field out."""
    raw = V2 | fields
    return {k: v for k, v in raw.items() if v is not ...}


YARN = {k: v for k, v in V2["rope_scaling"].items() if k != "type"}


@pytest.mark.parametrize("raw", [
    spelled(rope_scaling=YARN | {"type": "yarn"}),
    spelled(rope_scaling=YARN | {"rope_type": "yarn"}),
    spelled(rope_scaling=YARN | {"type": "yarn", "rope_type": "yarn"}),
    spelled(rope_scaling=..., rope_theta=..., rope_parameters=YARN | {"rope_type": "yarn", "rope_theta": 10000}),
    spelled(rope_scaling=None, rope_theta=..., rope_parameters=YARN | {"type": "yarn", "rope_theta": 10000.0}),
], ids=["type", "rope_type", "both", "rope_parameters", "rope_parameters beside null"])  # fmt: skip
def test_every_spelling_of_rope_means_the_same(raw):
    assert parse(raw) == parse(V2)


def test_rope_scaling_null_is_plain_rope():
    c = parse(spelled(rope_scaling=None))
    assert c.rope.rope_type == "default" and c.rope.attention_factor == 1.0
    assert c.softmax_scale == pytest.approx(192**-0.5, rel=1e-15)
    np.testing.assert_allclose(c.rope.inv_freq(64), 10000.0 ** (-np.arange(32) / 32), rtol=1e-12)
    assert parse(spelled(rope_scaling=...)) == c


def test_saved_by_transformers(tmp_path):
    checkpoints.write(tmp_path)
    c = registry.load(tmp_path)
    assert {k: getattr(c, k) for k in checkpoints.CONFIG if k != "rope_parameters"} == {
        k: v for k, v in checkpoints.CONFIG.items() if k != "rope_parameters"
    }
    assert c.rope.model_dump(exclude_unset=True) == checkpoints.YARN


def test_defaults_are_those_of_transformers():
    from transformers import DeepseekV2Config

    own = DeepseekV2Config()
    found = {k: own.rope_parameters["rope_theta"] if k == "rope_theta" else getattr(own, k) for k in DEFAULTS}
    assert found == DEFAULTS


@pytest.mark.parametrize("field", sorted(set(DEFAULTS) - {"rope_theta"}))
def test_missing_field_has_its_default_and_the_user_is_told(field):
    notes, default = [], DEFAULTS[field]
    raw = {k: v for k, v in LITE.items() if k != "num_key_value_heads"} | {"n_group": None, "topk_group": None}
    parsed = parse({k: v for k, v in raw.items() if k != field}, notes.append)
    assert getattr(parsed, field) == default
    off_by_default = field in ("attention_bias", "mlp_bias", "tie_word_embeddings", "n_group", "topk_group", "norm_topk_prob")
    assert off_by_default or any(f"{field} {default}" in note for note in notes)


@pytest.mark.parametrize("field", ["num_experts_per_tok", "model_type"])
def test_missing_field_without_a_default(field):
    with pytest.raises(ConfigError, match=f"{field} is (missing|None)"):
        parse({k: v for k, v in V2.items() if k not in (field, "architectures")})


@pytest.mark.parametrize("fields", [
    {"n_routed_experts": ..., "num_experts": 160}, {"num_experts": 160}, {"num_key_value_heads": 1},
    {"num_key_value_heads": None}, {"hidden_act": "swish"}, {"architectures": None}, {"architectures": ["DeepseekV2Model"]},
    {"model_type": ...}, {"norm_topk_prob": None}, {"attention_bias": None}, {"scoring_func": None}, {"moe_layer_freq": ...},
    {"rope_parameters": V2["rope_scaling"]}, {"rope_scaling": YARN | {"type": "yarn", "factor": 40.0}},
    {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000.0}}, {"rope_theta": ...}, {"torch_dtype": "float16"},
    {"rope_scaling": YARN | {"type": "deepseek_yarn"}}, {"rope_scaling": YARN | {"type": "yarn", "attention_factor": None}},
    {"original_max_position_embeddings": 4096}, {"head_dim": 77}, {"rope_scaling": YARN | {"type": "yarn", "unknown": 1}},
    {"quantization_config": {"quant_method": "fp8"}},
], ids=str)  # fmt: skip
def test_one_meaning_in_many_spellings(fields):
    assert parse(spelled(**fields)) == parse(V2)


TINY_ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.5}, "linear, mscale": {"type": "linear", "factor": 4, "mscale_all_dim": 0.7},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "mscale_all_dim": 0.7},
    "default, leftovers": {"type": "default", "factor": 4.0},
    "yarn, attention_factor": YARN | {"type": "yarn", "attention_factor": 1.3},
    "yarn, not truncated": YARN | {"type": "yarn", "truncate": False, "original_max_position_embeddings": 90},
    "yarn, no length": {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"} | {"type": "yarn"},
    "yarn, null betas": YARN | {"type": "yarn", "beta_fast": None, "beta_slow": None}, "theta only": {"rope_theta": 500.0},
}  # fmt: skip


@pytest.mark.parametrize("name", TINY_ROPES)
def test_rope_types_turn_as_in_transformers(name):
    """Frequencies, the factor on cos and sin, and the softmax scale of transformers' own modules."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

    raw = checkpoints.CONFIG | {"model_type": "deepseek_v2", "rope_parameters": TINY_ROPES[name], "qk_rope_head_dim": 16}
    c, own = parse(raw), DeepseekV2Config(**json.loads(json.dumps(raw)))
    rotary = hf.DeepseekV2RotaryEmbedding(own)
    np.testing.assert_allclose(c.rope.inv_freq(16), rotary.inv_freq.numpy(), rtol=2e-6)
    assert c.rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert c.softmax_scale == pytest.approx(hf.DeepseekV2Attention(own, 0).scaling, rel=1e-12)
    np.testing.assert_allclose(c.rope.inv_freq(16), formulas.inverse_frequencies(c), rtol=1e-12)


# field and value -> what the message must name: the field, what was found, what is accepted
BAD = {
    "topk_method": ({"topk_method": "noaux_tc"}, ["topk_method", "noaux_tc", "greedy", "group_limited_greedy"]),
    "topk_method null": ({"topk_method": None}, ["topk_method", "None", "group_limited_greedy"]),
    "scoring_func": ({"scoring_func": "relu"}, ["scoring_func", "relu", "softmax", "sigmoid"]),
    "hidden_act": ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    "rope type": ({"rope_scaling": {"type": "llama3", "factor": 2}}, ["rope_scaling", "llama3", "default", "linear", "yarn"]),
    "longrope": ({"rope_scaling": YARN | {"rope_type": "longrope"}}, ["rope_scaling", "longrope", "yarn"]),
    "no rope type": ({"rope_scaling": YARN}, ["rope_scaling", "type"]),
    "two rope types": ({"rope_scaling": YARN | {"type": "yarn", "rope_type": "default"}}, ["rope_scaling", "default", "yarn"]),
    "rope not an object": ({"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'", "object"]),
    "yarn without factor": (
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}}, ["rope_scaling", "factor"]
    ),
    "bad yarn value": ({"rope_scaling": YARN | {"type": "yarn", "factor": "40"}}, ["rope.factor", "'40'"]),
    "factor below 1": ({"rope_scaling": YARN | {"type": "yarn", "factor": 0.5}}, ["rope.factor", "0.5", "1"]),
    "unhashable rope type": ({"rope_scaling": YARN | {"type": ["yarn"]}}, ["rope_scaling", "yarn"]),
    "model_type": ({"model_type": "deepseek_v3"}, ["model_type", "deepseek_v3", "deepseek_v2"]),
    "architecture": ({"architectures": ["DeepseekV3ForCausalLM"]}, ["DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"]),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "linear", "factor"]),
    "two lengths": ({"original_max_position_embeddings": 99}, ["original_max_position_embeddings", "99", "4096"]),
    "two counts": ({"num_experts": 64}, ["n_routed_experts", "160", "num_experts", "64"]),
    "kv heads": ({"num_key_value_heads": 8}, ["num_key_value_heads", "8", "128"]),
    "groups": ({"n_group": 7}, ["n_routed_experts", "160", "n_group", "7"]),
    "kept groups": ({"topk_group": 9}, ["topk_group", "9", "n_group", "8"]),
    "no groups": ({"n_group": None}, ["n_group", "group_limited_greedy"]),
    "too many chosen": ({"num_experts_per_tok": 161}, ["num_experts_per_tok", "161", "160"]),
    "two ropes": ({"rope_parameters": YARN | {"type": "default"}}, ["rope_parameters", "rope_scaling", "differ"]),
    "two thetas": ({"rope_scaling": YARN | {"type": "yarn", "rope_theta": 500}}, ["rope_theta", "10000", "500"]),
    "normalized and scaled": ({"norm_topk_prob": True}, ["norm_topk_prob", "routed_scaling_factor", "16"]),
    "odd rope": ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim", "63", "even"]),
    "negative": ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1", "greater than 0"]),
    "zero": ({"kv_lora_rank": 0}, ["kv_lora_rank", "0", "greater than 0"]),
    "string": ({"hidden_size": "5120"}, ["hidden_size", "'5120'", "integer"]),
    "float": ({"hidden_size": 5120.5}, ["hidden_size", "5120.5", "integer"]),
    "boolean size": ({"num_attention_heads": True, "num_key_value_heads": True}, ["num_attention_heads", "True", "integer"]),
    "number for a flag": ({"norm_topk_prob": 1}, ["norm_topk_prob", "1", "boolean"]),
    "infinite": ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "inf", "finite"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias", "True", "False"]),
    "theta of 1": ({"rope_theta": 1}, ["rope_theta", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_value_is_named(tmp_path, case):
    fields, words = BAD[case]
    (tmp_path / "config.json").write_text(json.dumps(V2 | fields))
    with pytest.raises(ConfigError) as error:
        registry.load(tmp_path)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(error.value)


def test_all_findings_at_once():
    with pytest.raises(ConfigError, match=r"(?s)hidden_size.*topk_method"):
        parse(V2 | {"hidden_size": 0, "topk_method": "x"})


@pytest.mark.parametrize(("content", "word"), [
    (None, "not found"), (b"{", "JSON"), (b"\xff\xfe", "JSON"), (b"[]", "list"), (b"null", "NoneType"), (b"", "JSON"),
    (b"[" * 100_000, "JSON"),
], ids=["missing", "cut", "binary", "list", "null", "empty", "deep"])  # fmt: skip
def test_unreadable_file(tmp_path, content, word):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        registry.load(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and word in str(error.value)


def test_lite_routes_greedily_without_groups():
    """V2-Lite says n_group 1; a greedy config may also say null."""
    assert parse(LITE | {"n_group": None, "topk_group": None}).n_group is None


def test_a_config_finds_its_family():
    """And comes back from what a manifest keeps of it."""
    for raw in (V2, LITE):
        c = parse(raw)
        family = registry.of(c)
        assert family.model_type == raw["model_type"] and raw["architectures"][0].startswith(family.architectures)
        assert family.restore(json.loads(json.dumps(c.model_dump()))) == c
        kinds = [family.layer_kind(c, i) for i in range(c.num_hidden_layers)]
        assert kinds == [False] + [True] * (c.num_hidden_layers - 1)
    with pytest.raises(ConfigError, match=r"num_hidden_layers is missing"):
        family.restore({k: v for k, v in c.model_dump().items() if k != "num_hidden_layers"})


def test_immutable():
    with pytest.raises(ValueError, match="frozen"):
        parse(V2).hidden_size = 1
