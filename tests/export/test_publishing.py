"""Quantized checkpoints for other engines: against formulas, against ModelOpt's own files, and read by transformers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from latentrt.cli import main
from latentrt.export import publishing, recipe
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.export.publishing import write
from latentrt.export.publishing.modelopt import FP4, Fp8Tensors, Nvfp4Weights
from latentrt.export.samples import Samples
from tests import checkpoints
from tests.conftest import EXAMPLE

MADE_BY_MODELOPT = Path(__file__).parent.parent / "quantized"
# half a step of e4m3 (3 bits of mantissa), and of E2M1 between 4 and 6, relative to a block's largest element
STEP = dict.fromkeys(("fp8-block", "modelopt-fp8", "modelopt-fp8-tensor", "modelopt-fp8-block"), 2**-4)
STEP["modelopt-nvfp4"] = 1 / 6 * (1 + 2**-4)


@pytest.fixture(scope="module", params=publishing.FORMATS)
def published(request, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("published") / request.param
    write.write(Checkpoint(EXAMPLE), publishing.find(request.param), out, samples=samples_for(request.param))
    return request.param, out


def samples_for(name: str) -> Samples | None:
    return Samples(((7, 300, 5, 99, 4000, 12),)) if publishing.find(name).calibrated else None


def test_our_own_reader_gives_the_nearest_values(published):
    """Every weight within half a step of the original, and all that is not quantized as it was, in bfloat16."""
    name, out = published
    original, read = Checkpoint(EXAMPLE), Checkpoint(out)
    read.check()
    quantized, plain = write.plan(original, publishing.find(name))
    assert sum(quantized.values()) == 35 + 3 * 16 * 4, "the linears of the example, and its experts'"
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.0.self_attn.kv_b_proj"} <= set(plain)
    for tensor, done in quantized.items():
        expected, found = original.read(tensor).float(), read.read(tensor).float()
        if done:
            assert (found - expected).abs().max() <= STEP[name] * expected.abs().max(), tensor
            assert not torch.equal(found, expected)
        else:
            assert torch.equal(found, expected.bfloat16().float()), tensor


def test_both_layouts_of_the_configuration_say_the_same(published):
    """TensorRT-LLM reads hf_quant_config.json, vLLM what is in config.json."""
    name, out = published
    flat = json.loads((out / "config.json").read_text())["quantization_config"]
    if not name.startswith("modelopt"):
        assert flat == flat | {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        assert "lm_head" in flat["modules_to_not_convert"] and not (out / "hf_quant_config.json").exists()
        return
    nested = json.loads((out / "hf_quant_config.json").read_text())
    assert nested["producer"] == flat["producer"] and set(nested["quantization"]) == {
        "quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules",
    }  # fmt: skip
    assert flat["quant_algo"] == nested["quantization"]["quant_algo"]
    assert flat["ignore"] == nested["quantization"]["exclude_modules"] and "lm_head" in flat["ignore"]


@pytest.mark.parametrize("file", ["modelopt-nvfp4.safetensors"])
def test_values_that_modelopt_wrote_are_written_again(file):
    """Its weights, decoded and encoded here: the same codes wherever its scales come out again."""
    with safe_open(MADE_BY_MODELOPT / file, framework="pt") as theirs:
        modules = [n.removesuffix(".weight_scale_2") for n in theirs.keys() if n.endswith(".weight_scale_2")]  # noqa: SIM118
        assert modules
        for module in modules:
            stored = {k: theirs.get_tensor(f"{module}.{k}") for k in ("weight", "weight_scale", "weight_scale_2")}
            decoded = decode_nvfp4(**stored)
            again = decode_nvfp4(**Nvfp4Weights().encode(decoded))
            # groups whose largest element is not 6 times its scale get another scale: within half a step of it
            assert (again - decoded).abs().max() <= STEP["modelopt-nvfp4"] * decoded.abs().max()
            own = Nvfp4Weights().encode(decoded)
            same = own["weight_scale"].view(torch.uint8) == stored["weight_scale"].view(torch.uint8)
            groups = (own["weight"] == stored["weight"]).unflatten(1, (-1, 8)).all(-1)
            if torch.equal(own["weight_scale_2"], stored["weight_scale_2"].reshape(())):
                signless = (decoded == 0).unflatten(1, (-1, 16)).any(-1)  # ModelOpt has codes of -0
                assert (groups | signless)[same].all() and same.any()


def test_fp8_tensors_that_modelopt_wrote_are_written_again():
    """Its scales are a tensor's largest element / 448: codes come out again bit for bit, and names and shapes are its own."""
    with safe_open(MADE_BY_MODELOPT / "modelopt-fp8.safetensors", framework="pt") as theirs:
        names = set(theirs.keys())
        modules = [n.removesuffix(".input_scale") for n in names if n.endswith(".input_scale")]
        assert modules
        for module in modules:
            stored = {k: theirs.get_tensor(f"{module}.{k}") for k in ("weight", "weight_scale", "input_scale")}
            own = Fp8Tensors().encode(stored["weight"].float() * stored["weight_scale"])
            assert own["weight_scale"].shape == stored["weight_scale"].shape == stored["input_scale"].shape == ()
            torch.testing.assert_close(own["weight_scale"], stored["weight_scale"], rtol=2**-22, atol=0)
            assert torch.equal(own["weight"].view(torch.uint8), stored["weight"].view(torch.uint8))


@torch.no_grad()
def test_input_scales_are_the_largest_inputs_of_transformers_modules(small_checkpoint, tmp_path):
    """Experts share one scale a layer: of the rows that any of them meets, and of what their down_proj is given."""
    sequences = checkpoints.random_tokens([60, 1, 33], seed=3)
    write.write(Checkpoint(small_checkpoint), Fp8Tensors(), tmp_path / "out", samples=Samples(tuple(map(tuple, sequences))))
    largest, model = {}, checkpoints.reference(small_checkpoint)

    def note(name: str, value: torch.Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))

    def experts(name: str):
        def hook(module, inputs):
            rows, ids = inputs[0].flatten(0, -2), inputs[1].flatten(0, -2)
            note(f"{name}.gate_proj", rows)
            note(f"{name}.up_proj", rows)
            for expert in range(len(module.down_proj)):
                gate, up = (rows[(ids == expert).any(1)] @ module.gate_up_proj[expert].T).chunk(2, -1)
                if len(gate):
                    note(f"{name}.down_proj", gate * gate.sigmoid() * up)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs, name=name: note(name, inputs[0]))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(experts(name))
    for sequence in sequences:
        checkpoints.reference_logits(model, sequence)
    read = Checkpoint(tmp_path / "out")
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {n.removesuffix(".input_scale"): opened.get_tensor(n) for n in opened.keys() if n.endswith("input_scale")}  # noqa: SIM118
    quantized, _ = write.plan(Checkpoint(small_checkpoint), Fp8Tensors())
    assert {f"{name}.weight" for name in found} == {name for name, done in quantized.items() if done}
    for name, scale in found.items():
        asked = re.sub(r"experts\.\d+", "experts", name)
        assert float(scale) * 448 == pytest.approx(largest[asked], rel=1e-4), name
    read.check()


def decode_nvfp4(weight, weight_scale, weight_scale_2) -> torch.Tensor:
    """The definition: value = E2M1 * E4M3 * float32, two codes to a byte, the low one first."""
    table = torch.tensor([*FP4, *(-v for v in FP4)])
    codes = torch.stack([weight & 15, weight >> 4], -1).flatten(1).long()
    return (table[codes].unflatten(1, (-1, 16)) * (weight_scale.float() * weight_scale_2.float())[..., None]).flatten(1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-30, 1.0, 1e4]))
def test_nvfp4_takes_the_nearest_code_for_its_scales(rows, groups, seed, size):
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 16 * groups)).astype(np.float32)) * size
    stored = Nvfp4Weights().encode(weight)
    found = decode_nvfp4(**stored).double()
    step = (stored["weight_scale"].double() * stored["weight_scale_2"].double())[..., None]
    values = torch.tensor([*(-v for v in reversed(FP4)), *FP4], dtype=torch.float64)
    nearest = (weight.double().unflatten(1, (-1, 16))[..., None] - values * step[..., None]).abs().amin(-1).flatten(1)
    # float32 rounds the quotient that decides: by 2 to the power of -23 of a value up to 6 scales
    assert ((found - weight.double()).abs() <= nearest + 6 * step.expand(-1, -1, 16).flatten(1) * 2**-22).all()


@pytest.mark.slow
def test_transformers_computes_with_the_fp8_checkpoint(tmp_path):
    """Sizes are multiples of 128: it guesses the block from the scales' shape, and wrongly for others."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    sizes = dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, kv_lora_rank=96, qk_rope_head_dim=32,
                 qk_nope_head_dim=32, v_head_dim=32, num_attention_heads=4, vocab_size=320)  # fmt: skip
    source = checkpoints.write(tmp_path / "source", **sizes)
    write.write(Checkpoint(source), publishing.find("fp8-block"), tmp_path / "fp8")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    ours, state = Checkpoint(tmp_path / "fp8"), theirs.state_dict()
    quantized, _ = write.plan(Checkpoint(source), publishing.find("fp8-block"))
    compared = [name for name, done in quantized.items() if done and name in state]
    assert len(compared) > 8
    for name in compared:
        # transformers dequantizes to bfloat16 and widens
        torch.testing.assert_close(state[name].float(), ours.read(name).float(), rtol=2**-8, atol=0)


def test_interrupted_it_goes_on_after_the_last_whole_shard(tmp_path, monkeypatch):
    format, out = publishing.find("modelopt-fp8"), tmp_path / "out"
    whole = tmp_path / "whole"
    write.write(Checkpoint(EXAMPLE), format, whole)

    def interrupt(tensors: int) -> None:
        if len(list(out.glob("*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write.write(Checkpoint(EXAMPLE), format, out, progress=interrupt)
    assert not (out / "config.json").exists(), "nobody takes it for a checkpoint"
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    with pytest.raises(BuildError, match="holds an export of something else; give another folder"):
        write.write(Checkpoint(EXAMPLE), publishing.find("fp8-block"), out)
    write.write(Checkpoint(EXAMPLE), format, out)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    with pytest.raises(BuildError, match="is not empty; give another folder"):
        write.write(Checkpoint(EXAMPLE), format, out)


def test_a_recipe_keeps_modules_plain(tmp_path):
    file = tmp_path / "recipe.toml"
    recipe.write(file, ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.experts"])
    quantized, plain = write.plan(Checkpoint(EXAMPLE), publishing.find("fp8-block"), recipe.read(file))
    assert sum(quantized.values()) == 35 - 1 + 3 * 16 * 3
    assert "model.layers.0.mlp.down_proj" in plain and "model.layers.2.mlp.experts.7.up_proj" in plain


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    assert main(["export", str(EXAMPLE), "--out", str(tmp_path / "out"), "--format", "modelopt-nvfp4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tensors"] == len(json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"])
    assert main(["export", str(EXAMPLE), "--out", str(tmp_path / "b"), "--format", "int3"]) == 2
    assert "format is 'int3', accepted: fp8-block, modelopt-fp8" in capsys.readouterr().err


def test_sample_tokens_are_asked_for_where_they_are_needed(tmp_path, capsys):
    """Before the checkpoint is read; and an interrupted export does not calibrate again."""
    to = ["--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "none"), *to, "--format", "modelopt-fp8-tensor"]) == 2
    assert "give sample tokens, --calibration TEXT" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), *to, "--calibration", "x.txt"]) == 2
    assert "format fp8-block has no scales of inputs; leave --calibration out" in capsys.readouterr().err
    file = tmp_path / "samples.json"
    file.write_text("[[5, 9, 400], [7]]")
    command = ["export", str(EXAMPLE), *to, "--format", "modelopt-fp8-tensor", "--calibration", str(file)]
    assert main(command) == 0
    assert not [f.name for f in (tmp_path / "out").iterdir() if f.name.startswith(".")]


def test_an_interrupted_export_does_not_calibrate_again(tmp_path, monkeypatch):
    out, samples, layers = tmp_path / "out", samples_for("modelopt-fp8-tensor"), Checkpoint(EXAMPLE).config.num_hidden_layers
    told = []

    def interrupt(tensors: int) -> None:
        told.append(tensors)
        if len(told) == layers + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write.write(Checkpoint(EXAMPLE), Fp8Tensors(), out, progress=interrupt, samples=samples)
    with pytest.raises(BuildError, match="something else"):
        write.write(Checkpoint(EXAMPLE), Fp8Tensors(), out, samples=Samples(((1,),)))
    monkeypatch.setattr(write, "activation_scales", None)
    write.write(Checkpoint(EXAMPLE), Fp8Tensors(), out, samples=samples)
    Checkpoint(out).check()
