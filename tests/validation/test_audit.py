"""The audit must catch every wrong transformers that we know of, by name; each is injected here."""

import json

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.deepseek_v2 import config as config_file
from latentrt.validation.errors import ReferenceRefused
from latentrt.validation.reference.audit import audit
from latentrt.validation.reference.model import Reference
from tests import checkpoints

RAW = checkpoints.CONFIG | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}


def run(**fields):
    raw = json.loads(json.dumps(RAW | fields))
    return audit(config_file.parse(raw), raw)


def test_this_transformers_passes():
    checks = {c.name: c for c in run()}
    assert all(c.error < 1e-4 for c in checks.values())
    for name in ("YaRN mscale^2 in the softmax scale", "interleaved RoPE", "YaRN frequencies", "group limit",
                 "routed_scaling_factor", "eps of the latent norms"):  # fmt: skip
        assert checks[name].if_broken > 1e-3, name


@pytest.mark.parametrize(
    "fields",
    [
        {"q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None},
        {"rope_parameters": checkpoints.PLAIN_ROPE},
        {"rope_parameters": checkpoints.YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}},
        {"attention_bias": True, "n_shared_experts": 0},
        {"first_k_dense_replace": 3},
    ],
)
def test_other_configs_pass(fields):
    assert run(**fields)


def refused(*words, **fields):
    with pytest.raises(ReferenceRefused) as error:
        run(**fields)
    for word in (*words, "transformers"):
        assert word in str(error.value), str(error.value)


def test_missing_mscale_squared(monkeypatch):
    monkeypatch.setattr(hf, "yarn_apply_mscale", lambda rope_parameters, scaling: scaling)
    refused("mscale^2", "5.23.0")


def test_half_split_rope(monkeypatch):
    def half_split(xq, xk, freqs_cis):
        def turn(x):
            a, b = x.float().chunk(2, -1)
            z = torch.complex(a.contiguous(), b.contiguous()) * freqs_cis.unsqueeze(1)
            return torch.cat([z.real, z.imag], -1).type_as(x)

        return turn(xq), turn(xk)

    monkeypatch.setattr(hf, "apply_rotary_emb", half_split)
    refused("interleaved RoPE")


def test_both_at_once(monkeypatch):
    monkeypatch.setattr(hf, "yarn_apply_mscale", lambda rope_parameters, scaling: scaling)
    monkeypatch.setitem(hf.ROPE_INIT_FUNCTIONS, "yarn", hf.DeepseekV2RotaryEmbedding.compute_default_rope_parameters)
    refused("mscale^2", "YaRN frequencies")


def change_after(monkeypatch, cls, change):
    real = cls.__init__

    def init(self, config, *args, **kwargs):
        real(self, config, *args, **kwargs)
        change(self, config)

    monkeypatch.setattr(cls, "__init__", init)


@pytest.mark.parametrize("groups", [1, 3])
def test_wrong_group_limit(monkeypatch, groups):
    change_after(monkeypatch, hf.DeepseekV2TopkRouter, lambda self, c: setattr(self, "topk_group", groups))
    refused("group limit")


def test_group_limit_ignored(monkeypatch):
    change_after(monkeypatch, hf.DeepseekV2TopkRouter, lambda self, c: setattr(self, "topk_method", "greedy"))
    refused("group limit")


def test_dropped_scaling_factor(monkeypatch):
    change_after(monkeypatch, hf.DeepseekV2TopkRouter, lambda self, c: setattr(self, "routed_scaling_factor", 1.0))
    refused("routed_scaling_factor")


def test_wrong_latent_eps(monkeypatch):
    def change(self, config):
        self.kv_a_layernorm.variance_epsilon = self.q_a_layernorm.variance_epsilon = config.rms_norm_eps

    change_after(monkeypatch, hf.DeepseekV2Attention, change)
    refused("eps of the latent norms")


def test_missing_shared_experts(monkeypatch):
    monkeypatch.setattr(hf.DeepseekV2Moe, "forward", lambda self, x: self.experts(
        x.view(-1, x.shape[-1]), *self.gate(x)[:0:-1]).view(x.shape))  # fmt: skip
    refused("MoE block")


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_topk_prob": True, "routed_scaling_factor": 1.0},
        {"scoring_func": "sigmoid"},
        {"moe_layer_freq": 2},
    ],
)
def test_fields_that_transformers_ignores_are_refused(fields):
    refused(next(iter(fields)), **fields)


def test_tensors_loaded_wrongly(tiny_checkpoint, monkeypatch):
    real = hf.DeepseekV2ForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        model, info = real(*args, **kwargs)
        model.model.layers[1].mlp.experts.gate_up_proj.data[3].mul_(1.001)
        return model, info

    monkeypatch.setattr(hf.DeepseekV2ForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ReferenceRefused, match=r"2 tensors .*model\.layers\.1\.mlp\.experts\.3"):
        Reference(Checkpoint(tiny_checkpoint))
