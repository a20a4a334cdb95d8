"""Bad checkpoints of every kind: the error names the file and tensor, what was found and what was expected."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export import checkpoint as module
from latentrt.export.checkpoint import Checkpoint, combined_digest, safetensors_files
from latentrt.export.errors import CheckpointError
from latentrt.export.models.deepseek_v2.model import DeepseekV2Step
from tests import checkpoints

NORM, ROUTER = "model.layers.0.self_attn.kv_a_layernorm.weight", "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.fixture
def single(small_checkpoint, tmp_path):
    """A writable copy of the checkpoint in one file."""
    return shutil.copytree(small_checkpoint, tmp_path / "single")


@pytest.fixture(scope="module")
def sharded_original(small_checkpoint, tmp_path_factory):
    """The same tensors in three files and an index."""
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copy(small_checkpoint / "config.json", folder)
    tensors = load_file(small_checkpoint / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for shard in range(3):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        mine = names[shard::3]
        save_file({n: tensors[n] for n in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / module.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def sharded(sharded_original, tmp_path):
    return shutil.copytree(sharded_original, tmp_path / "sharded")


def opened(folder) -> Checkpoint:
    found = Checkpoint(folder)
    found.check()
    return found


def refuses(folder, *words, read: str | None = None) -> None:
    with pytest.raises(CheckpointError) as error:
        found = opened(folder)
        if read:
            found.read(read)
    for word in words:
        assert str(word) in str(error.value), f"{word!r} is not in: {error.value}"


def test_sharded_equals_single(small_checkpoint, sharded):
    one, three = opened(small_checkpoint), opened(sharded)
    assert len(three.files) == 3
    weights = [DeepseekV2Step(c.config).load_weights(c.read).state_dict() for c in (one, three)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_missing_tensor(single):
    checkpoints.edit_tensors(single, lambda t: t.pop(NORM))
    refuses(single, single, "missing", NORM, "[20]")


def test_extra_tensors_are_passed_over_with_a_word(single):
    """As transformers does: layers beyond the config, and what no module has."""
    checkpoints.edit_tensors(single, lambda t: t.update({"model.layers.9.extra": torch.zeros(2)}))
    assert any("model.layers.9.extra" in note for note in opened(single).notes)


def test_lora_matrices_among_the_weights_are_not_passed_over(single):
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.default.weight"
    checkpoints.edit_tensors(single, lambda t: t.update({name: torch.zeros(2, 30)}))
    refuses(single, "lora_A", "merge_and_unload")


def test_expert_beyond_the_config(single):
    checkpoints.edit_config(single, n_routed_experts=4, n_group=2, topk_group=1)
    refuses(single, "model.layers.1.mlp.experts.4.", "without a place", ROUTER, "[8, 48]", "[4, 48]", "n_routed_experts to 8")


def test_buffers_of_old_versions_are_ignored(single):
    checkpoints.edit_tensors(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    opened(single)


def test_misshapen(single):
    checkpoints.edit_tensors(single, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}))
    refuses(single, "model.safetensors", EXPERT, "[48, 32]", "[32, 48]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_wrong_dtype(single, dtype):
    checkpoints.edit_tensors(single, lambda t: t.update({ROUTER: t[ROUTER].to(dtype)}))
    name = {"int64": "I64", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}[str(dtype).split(".")[1]]
    refuses(single, ROUTER, name, "accepted")


def test_all_findings_at_once(single):
    checkpoints.edit_tensors(single, lambda t: (t.pop(NORM), t.update({EXPERT: torch.zeros(3), "more": torch.zeros(1)})))
    refuses(single, NORM, EXPERT, "[3]", "more")


def test_too_many_findings_are_counted(single):
    checkpoints.edit_tensors(single, lambda t: [t.pop(n) for n in list(t) if "experts" in n])
    refuses(single, "and 34 more")  # 2 layers of 8 experts of 3, and 3 shared ones each, 20 shown


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.001, 0])
def test_truncated(single, keep):
    file = single / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    refuses(single, file, "not a whole safetensors file", f"{int(len(whole) * keep)} bytes")


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x10" + b"\0" * 7 + b"not json, at all", b"\x02" + b"\0" * 7 + b"[]"])
def test_corrupt_header(single, header):
    file = single / "model.safetensors"
    file.write_bytes(header + file.read_bytes()[len(header) :])
    refuses(single, file, "not a whole safetensors file")


def test_offsets_out_of_order(single):
    """A header whose byte ranges do not cover the file is refused by safetensors, and by name by us."""
    file = single / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[NORM]["data_offsets"] = [0, 80]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    refuses(single, file, "not a whole safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite(single, value, dtype):
    def poison(tensors):
        tensors[EXPERT] = tensors[EXPERT].to(dtype)
        tensors[EXPERT][31, 47] = tensors[EXPERT][3, 5] = value

    checkpoints.edit_tensors(single, poison)
    opened(single)  # headers are fine; the element shows when the tensor is read
    refuses(single, "model.safetensors", EXPERT, "[3, 5]", value, "2 such", read=EXPERT)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuses(sharded, sharded / module.INDEX, "model-00002-of-00003.safetensors")


def edit_index(folder, change) -> None:
    index = json.loads((folder / module.INDEX).read_text())
    change(index["weight_map"])
    (folder / module.INDEX).write_text(json.dumps(index))


def wrong_shard(weight_map):
    weight_map[NORM] = next(f for f in sorted(weight_map.values()) if f != weight_map[NORM])


@pytest.mark.parametrize("change", [
    wrong_shard, lambda m: m.update({"model.ghost": "model-00001-of-00003.safetensors"}), lambda m: m.pop(NORM),
], ids=["names another shard", "names a tensor that is nowhere", "forgets a tensor"])  # fmt: skip
def test_an_index_only_names_the_files(sharded, change):
    """What counts is what the shards hold, as in transformers."""
    edit_index(sharded, change)
    assert NORM in opened(sharded).tensors and not opened(sharded).notes


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7, None])
def test_index_leaves_the_folder(sharded, name):
    (sharded.parent / "secret.safetensors").write_bytes(b"")
    edit_index(sharded, lambda m: m.update({NORM: name}))
    refuses(sharded, sharded / module.INDEX, repr(name), "*.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "null", "\x00"])
def test_unreadable_index(sharded, text):
    (sharded / module.INDEX).write_text(text)
    refuses(sharded, sharded / module.INDEX, "weight_map")


def test_single_file_beside_a_foreign_index(sharded, small_checkpoint):
    """The single file is read, as transformers does, and the user is told."""
    shutil.copy(small_checkpoint / "model.safetensors", sharded)
    checkpoints.edit_tensors(sharded, lambda t: t[NORM].add_(1))
    found = opened(sharded)
    assert found.read(NORM).equal(load_file(sharded / "model.safetensors")[NORM])
    assert any("model-00001-of-00003.safetensors" in note for note in found.notes)


def test_tensor_in_two_shards(sharded):
    first, second = (sharded / f"model-0000{k}-of-00003.safetensors" for k in (1, 2))
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file(load_file(second) | {name: tensors[name]}, second)
    opened(sharded)  # twice the same is no contradiction
    save_file(load_file(second) | {name: tensors[name] + 1}, second)
    refuses(sharded, name, first.name, second.name)


def test_only_pickles(small_checkpoint, tmp_path):
    shutil.copy(small_checkpoint / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refuses(tmp_path, tmp_path, "pytorch_model.bin", "pickle", "safetensors")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_beside_it_is_never_opened(single, monkeypatch):
    """The file is a folder-less bomb that no one can read; torch.load would also be seen."""
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (single / "modeling_deepseek.py").write_text("raise SystemExit('ran remote code')")
    checkpoints.edit_config(single, auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"})
    opened_files = []
    real = safetensors_files.safe_open
    monkeypatch.setattr(safetensors_files, "safe_open", lambda file, **k: opened_files.append(file.name) or real(file, **k))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    opened(single).read(NORM)
    assert set(opened_files) == {"model.safetensors"}


def test_not_a_folder(tmp_path):
    refuses(tmp_path / "nothing", tmp_path / "nothing", "not a folder")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "not a folder")


def test_empty_folder(tmp_path, small_checkpoint):
    with pytest.raises(ValueError, match=r"config\.json: not found"):
        Checkpoint(tmp_path)
    shutil.copy(small_checkpoint / "config.json", tmp_path)
    refuses(tmp_path, tmp_path, "model.safetensors")


def test_a_file_that_cannot_be_read(single):
    file = single / "model.safetensors"
    file.unlink()
    file.mkdir()
    refuses(single, file)


def test_mixed_dtypes_are_kept(single):
    """The router in float32, the rest in bfloat16: each tensor is read in its own dtype, with its own bits."""
    original = load_file(single / "model.safetensors")
    checkpoints.edit_tensors(single, lambda t: t.update({n: v.bfloat16() for n, v in t.items() if n != ROUTER}))
    found = opened(single)
    assert found.read(ROUTER).dtype == torch.float32 and torch.equal(found.read(ROUTER), original[ROUTER])
    assert found.read(EXPERT).dtype == torch.bfloat16 and torch.equal(found.read(EXPERT), original[EXPERT].bfloat16())


def test_tied_embeddings_need_no_head(tmp_path):
    checkpoints.write(tmp_path, tie_word_embeddings=True)
    found = opened(tmp_path)
    assert found.read("lm_head.weight").equal(found.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("keep", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_under_either_name(tmp_path, keep):
    """safetensors' save_model keeps the name that comes first of two tensors that share memory: the head's."""
    checkpoints.write(tmp_path, tie_word_embeddings=True)
    checkpoints.edit_tensors(tmp_path, lambda t: t.update({keep: t.pop("model.embed_tokens.weight")}))
    assert opened(tmp_path).read("lm_head.weight").equal(load_file(tmp_path / "model.safetensors")[keep])


def test_a_missing_head_is_told_from_missing_shards(single):
    checkpoints.edit_tensors(single, lambda t: t.pop("lm_head.weight"))
    refuses(single, "tie_word_embeddings to true")


def test_digest_follows_content_and_names(single):
    before = combined_digest(opened(single).file_digests())
    assert combined_digest(opened(single).file_digests()) == before
    checkpoints.edit_tensors(single, lambda t: t[NORM].add_(1e-3))
    assert combined_digest(opened(single).file_digests()) != before


def test_known_digests_are_reused_only_for_unchanged_files(single):
    known = opened(single).file_digests()
    known["config.json"]["sha256"] = "0" * 64
    assert opened(single).file_digests(known)["config.json"]["sha256"] == "0" * 64
    checkpoints.edit_config(single, rms_norm_eps=1e-4)
    assert opened(single).file_digests(known)["config.json"]["sha256"] != "0" * 64
