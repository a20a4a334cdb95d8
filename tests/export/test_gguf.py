"""GGUF files: against the gguf package's own values (tests/quantized), and files written here with its GGUFWriter."""

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from latentrt.export.checkpoint import Checkpoint, gguf_files
from latentrt.export.checkpoint.base import Part
from latentrt.export.checkpoint.gguf_files import GgufFiles
from latentrt.export.errors import CheckpointError
from latentrt.export.models.deepseek_v2 import config as deepseek_v2
from latentrt.export.models.deepseek_v2 import weights as deepseek_v2_weights
from tests.export.test_quantized import from_blocks
from tests.gguf_writing import BOS, EOS, EXPERTS, NAMES, metadata, vocabulary, write

ROOT = Path(__file__).parents[2]
FILES, CONFIGS, EXAMPLE = ROOT / "tests" / "quantized", ROOT / "tests" / "configs", ROOT / "examples" / "tiny-deepseek-v2"
EXPECTED = json.loads((FILES / "expected.json").read_text())
SMALL = {
    "model_type": "deepseek_v2", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "max_position_embeddings": 128, "rope_theta": 10000.0, "rope_scaling": None, "eos_token_id": 1,
}  # fmt: skip



def model(kind: Type, whole_kv: bool = False, tied: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """All tensors of SMALL as GGUF has them, matrices in `kind`, and the weights that they stand for."""
    rng, c = np.random.default_rng(0), deepseek_v2.parse(SMALL)
    tensors: dict[str, tuple[np.ndarray, Type]] = {}
    weights: dict[str, torch.Tensor] = {}

    def add(name: str, shape: tuple[int, ...]) -> np.ndarray:
        exact = len(shape) == 1 or "ffn_gate_inp" in name
        data = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), Type.F32 if exact else kind)
        tensors[name] = (data, Type.F32 if exact else kind)
        return gguf.quants.dequantize(data, tensors[name][1])

    experts: dict[str, np.ndarray] = {}
    for name, shape in deepseek_v2_weights.checkpoint_tensors(c).items():
        parts = name.split(".")
        if name in gguf_files.WHOLE.values():
            old = next(k for k, v in gguf_files.WHOLE.items() if v == name)
            if old != "output.weight" or not tied:
                weights[name] = torch.from_numpy(add(old, shape))
            continue
        layer, inner = parts[2], ".".join(parts[3:-1])
        if inner == "self_attn.kv_b_proj" and not whole_kv:
            key = add(f"blk.{layer}.attn_k_b.weight", (2, 32, 32))  # [H, kv_lora_rank, nope]
            value = add(f"blk.{layer}.attn_v_b.weight", (2, 64, 32))  # [H, v, kv_lora_rank]
            both = np.concatenate([key.transpose(0, 2, 1), value], 1)
            weights[name] = torch.from_numpy(both.reshape(shape))
        elif ".experts." in name:
            stacked = f"blk.{layer}.{EXPERTS[parts[-2]]}.weight"
            if stacked not in experts:
                experts[stacked] = add(stacked, (4, *shape))
            weights[name] = torch.from_numpy(experts[stacked][int(parts[5])])
        else:
            weights[name] = torch.from_numpy(add(f"blk.{layer}.{NAMES[inner]}.weight", shape))
    return tensors, weights


def decoded(files: GgufFiles) -> dict[str, torch.Tensor]:
    found, explained = files.sources()
    assert explained == set(files.tensors)
    result = {name: source.decode(*map(files.read, source.parts)) for name, source in found.items()}
    assert all(tuple(result[name].shape) == source.shape for name, source in found.items())
    for name, source in found.items():
        if source.blocks is not None:
            assert from_blocks(source.blocks, *source.blocks.read(*map(files.read, source.parts))).equal(result[name]), name
    return result


# The package's own values


@pytest.mark.parametrize("name", ["gguf-q8_0", "gguf-q4_0"])
def test_equals_the_tools_own_values(name):
    found = decoded(GgufFiles([FILES / f"{name}.gguf"]))
    assert set(found) == set(EXPECTED[name]["sha256"])
    for weight, expected in EXPECTED[name]["sha256"].items():
        octets = found[weight].float().contiguous().numpy().astype("<f4").tobytes()
        assert hashlib.sha256(octets).hexdigest() == expected, weight


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
@pytest.mark.parametrize("whole_kv", [False, True], ids=["k_b and v_b", "kv_b"])
def test_every_weight_of_a_model(tmp_path, kind, whole_kv):
    tensors, weights = model(Type[kind], whole_kv)
    files = GgufFiles([write(tmp_path / "m.gguf", metadata(SMALL), tensors)])
    assert deepseek_v2.parse(files.config) == deepseek_v2.parse(SMALL)
    found = decoded(files)
    expected = deepseek_v2_weights.checkpoint_tensors(deepseek_v2.parse(SMALL))
    assert {name: tuple(weight.shape) for name, weight in found.items()} == expected
    for name, weight in weights.items():
        assert torch.equal(found[name].float(), weight), name
        if kind in ("Q4_0", "Q8_0") and weight.ndim == 2 and not name.endswith(("mlp.gate.weight", "kv_b_proj.weight")):
            assert (blocks := files.sources()[0][name].blocks) and (blocks.size, blocks.bits) == (32, int(kind[1]))
        if kind in gguf_files.PLAIN and found[name].ndim == 2 and not name.endswith("mlp.gate.weight"):
            assert found[name].dtype == getattr(torch, gguf_files.PLAIN[kind])


READABLE = [k for k in Type if k.name not in gguf_files.PLAIN and gguf_files._dequantizes(k)]


@pytest.mark.parametrize("kind", READABLE, ids=lambda k: k.name)
def test_pieces_of_every_type_of_block(tmp_path, kind):
    """Random bytes: an expert, and rows of it, are those of the whole as the package dequantizes it."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    octets = np.random.default_rng(0).integers(0, 256, (3, 8, 2 * size), np.uint8)
    tensors, _ = model(Type.F16)
    name = "blk.1.ffn_up_exps.weight"
    files = GgufFiles([write(tmp_path / "m.gguf", metadata(SMALL), tensors | {name: (octets, kind)})])
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(octets, kind)  # [3, 8, 2 * block]
        source = files.sources()[0]["model.layers.1.mlp.experts.2.up_proj.weight"]
        got = source.decode(files.read(source.parts[0]))
        rows = source.decode(files.read(Part(name, 1, (2, 7))))
    assert source.shape == (8, 2 * block) and source.storage == f"GGUF {kind.name}"
    np.testing.assert_array_equal(got.numpy(), expected[2])
    np.testing.assert_array_equal(rows.numpy(), expected[1, 2:7])
    assert files.tensors[name].shape == (3, 8, 2 * block) and files.tensors[name].dtype == kind.name


def test_tied_embeddings(tmp_path):
    tensors, _ = model(Type.Q8_0, tied=True)
    files = GgufFiles([write(tmp_path / "m.gguf", metadata(SMALL), tensors)])
    assert files.config["tie_word_embeddings"] is True and "lm_head.weight" not in files.sources()[0]


def test_a_whole_kv_b_beside_its_halves_is_taken(tmp_path):
    tensors, weights = model(Type.Q8_0, whole_kv=True)
    halves, _ = model(Type.Q4_0)
    tensors |= {name: data for name, data in halves.items() if "attn_k_b" in name or "attn_v_b" in name}
    found = decoded(GgufFiles([write(tmp_path / "m.gguf", metadata(SMALL), tensors)]))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(found[name], weights[name])


# config.json


@pytest.mark.parametrize("name", sorted(f.stem for f in CONFIGS.glob("*.json")))
def test_configs_of_published_models(tmp_path, name):
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    embedding = {"token_embd.weight": (np.zeros((raw["vocab_size"], 1), np.float32), Type.F32)}
    output = {"output.weight": (np.zeros((1, 1), np.float32), Type.F32)}
    files = GgufFiles([write(tmp_path / "m.gguf", metadata(raw), embedding | output)])
    assert deepseek_v2.parse(files.config) == deepseek_v2.parse(raw)


def test_files_from_before_absorbed_attention_and_expert_groups(tmp_path):
    fields = {k: v for k, v in metadata(SMALL).items() if "_mla" not in k and "group" not in k and "gating" not in k}
    fields |= {"deepseek2.attention.key_length": 64, "deepseek2.attention.value_length": 64}
    files = GgufFiles([write(tmp_path / "m.gguf", fields, model(Type.F16, whole_kv=True)[0])])
    assert deepseek_v2.parse(files.config) == deepseek_v2.parse(SMALL)


# Split files


def split(folder: Path, **more) -> list[Path]:
    tensors, _ = model(Type.Q8_0)
    names = list(tensors)
    shares = [names[:5], names[5:12], names[12:]]
    fields = {"split.count": 3, "split.tensors.count": len(names)} | more
    return [
        write(
            folder / f"m-0000{i + 1}-of-00003.gguf",
            (metadata(SMALL) if i == 0 else {}) | fields | {"split.no": i},
            {name: tensors[name] for name in share},
        )
        for i, share in enumerate(shares)
    ]


def test_split_files(tmp_path):
    parts = split(tmp_path)
    _, weights = model(Type.Q8_0)
    files = GgufFiles(parts[::-1])
    assert files.files == parts
    found = decoded(files)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    with pytest.raises(CheckpointError, match=r"one model in 3 GGUF parts is expected, found part 1, 3 \(m-00001"):
        GgufFiles([parts[0], parts[2]])
    with pytest.raises(CheckpointError, match=r"found part 1, 1, 2, 3"):
        GgufFiles([*parts, parts[0]])
    with pytest.raises(CheckpointError, match=r"says that all parts hold 99 tensors, found 29"):
        GgufFiles(split(tmp_path, **{"split.tensors.count": 99}))


# What is refused


def test_other_models_by_name(tmp_path):
    tensors, _ = model(Type.Q8_0)
    bias = (np.zeros(4, np.float32), Type.F32)

    def opened(fields=(), more=(), architecture="deepseek2", without=()):
        given = {k: v for k, v in (metadata(SMALL) | dict(fields)).items() if k not in without}
        return GgufFiles([write(tmp_path / "m.gguf", given, tensors | dict(more), architecture)])

    with pytest.raises(CheckpointError, match=r"general.architecture is 'llama'; accepted: 'deepseek2'"):
        opened(architecture="llama")
    with pytest.raises(CheckpointError, match=r"expert_gating_func is 2; accepted: 1 \(softmax\): this is no DeepSeek-V2"):
        opened({"deepseek2.expert_gating_func": 2})
    with pytest.raises(CheckpointError, match=r"blk.1.exp_probs_b.bias corrects the router as DeepSeek-V3 does"):
        opened(more={"blk.1.exp_probs_b.bias": bias})
    with pytest.raises(CheckpointError, match="nextn_predict_layers is given"):
        opened({"deepseek2.nextn_predict_layers": 1})
    with pytest.raises(CheckpointError, match=r"rope.scaling.type is 'linear'; accepted: 'none', 'yarn'"):
        opened({"deepseek2.rope.scaling.type": "linear"})
    with pytest.raises(CheckpointError, match=r"metadata deepseek2.attention.kv_lora_rank is missing"):
        opened(without=["deepseek2.attention.kv_lora_rank"])
    with pytest.raises(CheckpointError, match=r"tensor blk.0.attn_v_b.weight is missing beside blk.0.attn_k_b.weight"):
        del tensors["blk.0.attn_v_b.weight"]
        opened().sources()


def test_types_that_the_package_does_not_dequantize(tmp_path):
    tensors, _ = model(Type.Q8_0)
    octets = (np.zeros((96, 2 * gguf.GGML_QUANT_SIZES[Type.Q8_K][1]), np.uint8), Type.Q8_K)
    files = GgufFiles([write(tmp_path / "m.gguf", metadata(SMALL), tensors | {"blk.0.ffn_up.weight": octets})])
    with pytest.raises(CheckpointError, match=r"ffn_up.weight has type Q8_K; accepted: F32, F16, BF16, Q4_0, .*llama-quantize"):
        files.sources()


def test_unknown_tensors_are_left_unexplained(tmp_path):
    tensors, _ = model(Type.Q8_0)
    more = {
        "blk.0.attn_sinks.weight": (np.zeros(4, np.float32), Type.F32),
        "rope_freqs.weight": (np.zeros(4, np.float32), Type.F32),
    }
    files = GgufFiles([write(tmp_path / "m.gguf", metadata(SMALL), tensors | more)])
    assert set(files.tensors) - files.sources()[1] == {"blk.0.attn_sinks.weight"}


def test_damaged_files(tmp_path):
    whole = (FILES / "gguf-q8_0.gguf").read_bytes()
    file = tmp_path / "m.gguf"
    for size in [*range(0, 3000, 37), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a whole GGUF file"):
            GgufFiles([file])
    file.write_bytes(b"\x80\x04" + whole[2:])
    with pytest.raises(CheckpointError, match="GGUF magic invalid"):
        GgufFiles([file])
    file.write_bytes(whole[:4] + whole[4:8][::-1] + whole[8:])
    with pytest.raises(CheckpointError, match="other byte order"):
        GgufFiles([file])
    counts = bytearray(whole)
    counts[8:16] = b"\xff" * 8  # a number of tensors that no file has
    file.write_bytes(counts)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        GgufFiles([file])


# The tokenizer

TEXTS = [
    "def main():\n    print('hello, world')\n",
    "  naïve façade — 12345 + 67,8 = ?!\t\n\n",
    "深度求索 \uff24\uff25\uff30。 한국어 हिन्दी 🙂",
    "",
    " ",
]


def with_vocabulary(folder: Path, **more) -> GgufFiles:
    embedding = {"token_embd.weight": (np.zeros((8, 64), np.float32), Type.F32)}
    return GgufFiles([write(folder / "m.gguf", metadata(SMALL) | vocabulary(**more), embedding)])


def test_the_tokenizer_comes_back(tmp_path):
    files = with_vocabulary(tmp_path)
    assert (files.config["bos_token_id"], files.config["eos_token_id"]) == (0, 1)
    assert [file.name for file in files.tokenizer_files(tmp_path)] == ["tokenizer.json", "tokenizer_config.json"]
    original, ours = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (EXAMPLE, tmp_path))
    assert ours.get_vocab() == original.get_vocab()
    for text in [*TEXTS, (EXAMPLE / "held_out.txt").read_text()[:4000], f"{BOS}a{EOS}"]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (BOS, EOS)
    assert config["add_bos_token"] is True and config["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("deepseek-llm", ["x", " =", " ", "1", "2", "3", "4", "\n", " deep", "求索", "。"]),
        ("deepseek-coder", ["x", " = ", "1", "2", "3", "4", "\n", " deep", "求索", "。"]),  # "=" is a symbol
        ("deepseek-v3", ["x", " =", " ", "123", "4", "\n", " deep", "求索", "。"]),
    ],
)
def test_texts_are_cut_as_deepseeks_tokenizers_do(tmp_path, pre, pieces):
    with_vocabulary(tmp_path, pre=pre).tokenizer_files(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "x = 1234\n deep求索。"
    assert [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_vocabularies_that_are_not_read(tmp_path):
    for more, message in [
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer.ggml.model is 'llama'; accepted: 'gpt2' .*tokenizer.json"),
        ({"pre": "qwen2"}, r"tokenizer.ggml.pre is 'qwen2'; accepted: deepseek-llm, .*beside the .gguf file"),
        ({"tokenizer.ggml.bos_token_id": 99999}, "bos_token_id is 99999, but there are 4096 tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "must be lists of the same length"),
        ({"tokenizer.ggml.merges": [1]}, "merges must be a list of str"),
        ({"tokenizer.ggml.merges": ["ab"]}, "not two tokens with a space between"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            with_vocabulary(tmp_path, **more).tokenizer_files(tmp_path)
    assert with_vocabulary(tmp_path, **{"tokenizer.ggml.model": "no_vocab"}).tokenizer_files(tmp_path) == []


def test_large_tensors_are_decoded_in_runs_of_rows(tmp_path):
    """As the writer of weights asks for them: the same values as of the whole tensor."""
    tensors, weights = model(Type.Q8_0)
    checkpoint = Checkpoint(write(tmp_path / "m.gguf", metadata(SMALL), tensors))
    checkpoint.check()
    assert set(checkpoint.tensors) == set(weights) and checkpoint.config == deepseek_v2.parse(SMALL)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.experts.2.down_proj.weight", "model.norm.weight"):
        whole = checkpoint.read(name)
        found = list(checkpoint.pieces(name, 3 * whole[0].numel()))
        assert torch.cat(found).equal(whole) and all(len(piece) <= 3 for piece in found)
