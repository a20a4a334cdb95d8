"""The CPU lowering end to end: bundles of random checkpoints, run by the runtime's backend, against transformers.

Pages hold 4 tokens here instead of 64, so that short sequences use many.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentrt.export.lowering.base import Lowering
from latentrt.runtime import backends
from latentrt.runtime.bundle.reader import Bundle
from tests import checkpoints, ragged
from tests.builds import build, locked
from tests.checkpoints import PLAIN_ROPE, YARN
from tests.formula import Formula

pytestmark = pytest.mark.slow

PAGE_SIZE = 4
# What only the lowering and the engine can get wrong, one checkpoint each; all else is test_model.py's.
CASES = {
    "limited": {},
    "lite": {"topk_method": "greedy", "q_lora_rank": None, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
             "num_attention_heads": 6, "n_shared_experts": 2, "first_k_dense_replace": 0, "num_hidden_layers": 2},
    "biased": {"attention_bias": True, "tie_word_embeddings": True, "n_shared_experts": 0, "num_hidden_layers": 2,
               "num_experts_per_tok": 8, "topk_group": 1, "rope_parameters": PLAIN_ROPE},
    "dense": {"first_k_dense_replace": 2, "num_hidden_layers": 2, "num_attention_heads": 1,
              "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
}  # fmt: skip
# float32 on both sides, other sums, logits of size 5 to 10 (issue 2 asks for 1e-3)
FP32_TOLERANCE = 5e-5


@pytest.fixture(scope="session")
def engines(shared, traced):
    """(case, precision, accuracy, cache format) -> checkpoint folder and bundle folder; each built once a run."""

    def built(case: str = "limited", precision="fp32", accuracy="exact", cache_format="float32") -> tuple[Path, Path]:
        checkpoint, out = shared / f"engine.{case}", shared / f"engine.{case}.{precision}.{accuracy}.{cache_format}"
        with locked(shared / f"engine.{case}.lock"), traced.remembered() as patch:
            patch.setattr(Lowering, "page_size", PAGE_SIZE)
            if not checkpoint.exists():
                checkpoints.write(checkpoint, seed=21, **CASES[case])
            if not (out / "manifest.json").exists():
                build(checkpoint, out, "cpu", precision, accuracy, cache_format)
        return checkpoint, out

    return built


def load(out: Path, pages: ragged.Pages):
    """The backend with exactly the pages of the test; page 0 comes on top."""
    return backends.load(Bundle(out), cache_tokens=(pages.num_pages - 1) * pages.page_size, threads=1)


LENGTHS = [21, 9, 0, 1]
SCHEDULES = {
    "prefill": ([], (0,)), "chunks": ([[5, 0, 0, 1], [3, 9, 0, 0], [7, 0, 0, 0]], (3, 0)),
    "token by token": ([[1] * 4] * 21, (0, 1)),
}  # fmt: skip


def run(out: Path, schedule: str = "chunks", seed: int = 1) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of the non-empty sequences, and their tokens."""
    sequences, pages = checkpoints.random_tokens(LENGTHS, seed), ragged.Pages(LENGTHS, PAGE_SIZE, seed)
    backend = load(out, pages)
    assert backend.num_pages == pages.num_pages
    found = ragged.run(ragged.engine_step(backend), sequences, SCHEDULES[schedule][0], pages, SCHEDULES[schedule][1])
    return found, [s for s in sequences if s]


def expected(checkpoint: Path, sequences: list[list[int]]) -> list[np.ndarray]:
    formula = Formula(checkpoint)
    for tokens in sequences:
        formula.logits(tokens)
    assert formula.margin > 1e-5  # no near tie in the routing: rounding cannot flip an expert
    model = checkpoints.reference(checkpoint)
    return [checkpoints.reference_logits(model, s).numpy() for s in sequences]


def worst(found, wanted) -> float:
    return max(float(np.abs(f - w).max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_fp32_equals_transformers(engines, case):
    checkpoint, out = engines(case)
    for schedule in SCHEDULES:
        found, sequences = run(out, schedule)
        assert worst(found, expected(checkpoint, sequences)) < FP32_TOLERANCE, schedule


def test_float16_cache(engines):
    """Half precision keeps 11 bits: each cached element moves by 2^-12 at most, relative; through three layers logits of
    size 5 move by some 10^-3. The same rounding in the torch model leaves float32 noise, and the few cached elements which
    that noise makes round to the other side."""
    from latentrt.export.checkpoint import Checkpoint
    from latentrt.export.models.deepseek_v2.model import DeepseekV2Step

    checkpoint, out = engines(cache_format="float16")
    found, sequences = run(out)
    assert 1e-5 < worst(found, expected(checkpoint, sequences)) < 2e-2
    opened = Checkpoint(checkpoint)
    model = DeepseekV2Step(opened.config, "float16").load_weights(opened.read)
    pages = ragged.Pages([len(s) for s in sequences], PAGE_SIZE)
    ours = ragged.run(ragged.torch_step(model, pages, torch.float16), sequences, [], pages)
    assert worst(found, ours) < 2e-3


def out_of_panels(values: torch.Tensor, scale: torch.Tensor, experts: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., panels, blocks, bytes / 4, 16, 4] and [..., panels, blocks, 16] by rows; what fills a panel up has the scale 0."""
    values = values.movedim(-2, -4).flatten(-2).flatten(-4, -3)
    scale = scale.movedim(-1, -2).flatten(-3, -2)
    real = int((scale != 0).reshape(-1, *scale.shape[-2:])[0, :, 0].sum())
    values, scale = values[..., :real, :, :], scale[..., :real, :]
    return values.flatten(-2) if experts else values, scale


def dequantized(checkpoint: Path, out: Path, target: Path) -> Path:
    """The checkpoint with every tensor replaced by what the bundle's stored tensors stand for, decoded here."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted((out / "files").glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            stored |= {n: handle.get_tensor(n) for n in sorted(handle.keys())}
    manifest = json.loads((out / "manifest.json").read_text())
    int4 = next(iter(manifest["targets"].values()))["precision"] == "int4"
    (weights,) = manifest["weight_sets"].values()
    if weights["format"]["layout"] == "panels16":
        for name in [n for n in stored if f"{n}.scale" in stored]:
            stored[name], stored[f"{name}.scale"] = out_of_panels(stored[name], stored[f"{name}.scale"], ".experts." in name)
    for name in [n for n in stored if f"{n}.scale" in stored]:
        dense = tuple(f".mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        eight = "lm_head.weight", "w_uk", "w_uv", "kv_a_proj_with_mqa.weight", *dense
        four = int4 and not name.endswith(eight)
        stored[name] = centred(stored[name], four)

    def values(name: str, inputs: int) -> torch.Tensor:
        """[..., out, in] float32 of codes [..., out, blocks, block] and scales [..., out, blocks]."""
        return (stored[name] * stored[f"{name}.scale"][..., None]).flatten(-2)[..., :inputs]

    original = {n: t for n, t in load_file(checkpoint / "model.safetensors").items() if t.numel()}
    new = {}
    config = json.loads((checkpoint / "config.json").read_text())
    for name, tensor in original.items():
        prefix = name.rsplit(".experts.", 1)[0] + ".experts"
        if name in stored and f"{name}.scale" not in stored:
            new[name] = stored[name]
        elif name in stored:
            new[name] = values(name, tensor.shape[1])
        elif name.endswith("kv_b_proj.weight"):
            base = name.removesuffix("weight")
            w_uk = values(base + "w_uk", config["qk_nope_head_dim"]).mT  # stored [H, kv_lora_rank, nope]
            w_uv = values(base + "w_uv", config["kv_lora_rank"])  # stored [H, v, kv_lora_rank]
            new[name] = torch.cat([w_uk, w_uv], 1).flatten(0, 1)
        else:
            expert, part = int(name.split(".")[-3]), name.split(".")[-2]
            if part == "down_proj":
                new[name] = expert_rows(stored, f"{prefix}.down_proj", expert)
            else:
                new[name] = expert_rows(stored, f"{prefix}.gate_up_proj", expert)[part == "up_proj" :: 2]
        assert new[name].shape == tensor.shape, name
        most = 0.3 if int4 else 1 / 127  # of the largest: one step of 8 bits, what a search clips at 4: decoded rightly
        assert (new[name] - tensor).abs().max() <= tensor.abs().max() * most, name
    shutil.copytree(checkpoint, target)
    if config["tie_word_embeddings"]:  # the embedding stays float32, the head is quantized: they are no longer one tensor
        new["lm_head.weight"] = values("lm_head.weight", config["hidden_size"])
        checkpoints.edit_config(target, tie_word_embeddings=False)
    save_file({n: t.contiguous() for n, t in new.items()}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def centred(octets: torch.Tensor, four: bool) -> torch.Tensor:
    """float32 from -128 to 127, one a byte; or from -8 to 7, two a byte, low half first."""
    if not four:
        return octets.float() - 128
    return torch.stack([octets % 16, octets // 16], -1).flatten(-2).float() - 8


def expert_rows(stored, name: str, expert: int) -> torch.Tensor:
    """[out, in] of one expert; its scales are per output, or per output and block of inputs."""
    quantized, scale = stored[name][expert], stored[f"{name}.scale"][expert]
    blocks = scale.shape[1] if scale.dim() == 2 else 1
    return (quantized.unflatten(-1, (blocks, -1)) * scale.reshape(-1, blocks, 1)).flatten(-2)


@pytest.mark.parametrize("case", ["limited", "lite", "biased"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_exact_equals_transformers_with_dequantized_weights(engines, case, precision, tmp_path):
    """The weights are the same numbers, so only float32 sums differ; the original weights are far off, so that it shows
    when the engine runs with them."""
    checkpoint, out = engines(case, precision, "exact")
    found, sequences = run(out)
    decoded = dequantized(checkpoint, out, tmp_path / "dequantized")
    assert worst(found, expected(decoded, sequences)) < 2e-4  # issue 2 asks for 1e-3
    assert worst(found, expected(checkpoint, sequences)) > 1e-2


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_fast_is_near(engines, precision, tmp_path):
    """Activations are rounded to int8 as well: next-token distributions stay close to the dequantized weights' ones."""
    checkpoint, out = engines("limited", precision, "fast")
    found, sequences = run(out)
    wanted = np.concatenate(expected(dequantized(checkpoint, out, tmp_path / "dequantized"), sequences))
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (wanted, np.concatenate(found))]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert 1e-9 < divergence < 0.02  # nats; a random model routes less surely than a trained one, whose bound is 0.01


def test_cache_is_written_in_place(engines):
    """The buffers stay where they are; a step changes its own new cells and, for padding, page 0."""
    _, out = engines()
    pages = ragged.Pages([10, 6], PAGE_SIZE, seed=4)
    backend = load(out, pages)
    step = ragged.engine_step(backend)
    places = [c.ctypes.data for c in backend.caches]
    sequences = checkpoints.random_tokens([10, 6])
    ragged.run(step, [s[:5] for s in sequences], [], pages)
    before = [c.copy() for c in backend.caches]
    step(ragged.batch([sequences[0][5:7], []], [5, 5], pages.table, padding=3))
    assert places == [c.ctypes.data for c in backend.caches]
    written = {(int(pages.table[0, p // PAGE_SIZE]), p % PAGE_SIZE) for p in (5, 6)}
    for old, new in zip(before, backend.caches, strict=True):
        same = ((old == new) | (np.isnan(old) & np.isnan(new))).all(-1)
        assert {(p, s) for p, s in np.argwhere(~same).tolist() if p != 0} == written


def test_shared_prefix_pages(engines):
    """Two sequences share the pages of their common first 8 tokens: neither changes them, both get their own logits."""
    checkpoint, out = engines()
    prefix, first, second = checkpoints.random_tokens([8, 5, 7], seed=9)
    pages = ragged.Pages([13, 15], PAGE_SIZE)
    backend = load(out, pages)
    step = ragged.engine_step(backend)
    step(ragged.batch([prefix], [0], pages.table[:1]))
    shared_pages = pages.table[0, :2]
    before = [c[shared_pages].copy() for c in backend.caches]
    table = pages.table.copy()
    table[1, :2] = shared_pages
    logits = step(ragged.batch([first, second], [8, 8], table))
    wanted = expected(checkpoint, [prefix + first, prefix + second])
    assert worst([logits[:5], logits[5:]], [wanted[0][8:], wanted[1][8:]]) < FP32_TOLERANCE
    for old, cache in zip(before, backend.caches, strict=True):
        np.testing.assert_array_equal(old, cache[shared_pages])


def chosen_experts(checkpoint: Path, tokens: list[int]) -> dict[int, set[int]]:
    """Layer -> experts that any of the tokens goes to, by the float64 formula."""
    formula, chosen, layer = Formula(checkpoint), {}, None
    route, moe = formula.route, formula.moe

    def watched_moe(prefix, x):
        nonlocal layer
        layer = int(prefix.split(".")[2])
        return moe(prefix, x)

    def watched_route(logits):
        found = route(logits)
        chosen.setdefault(layer, set()).update(e for e, _ in found)
        return found

    formula.moe, formula.route = watched_moe, watched_route
    formula.logits(tokens)
    assert formula.margin > 1e-4
    return chosen


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_only_chosen_experts_are_computed(engines, tmp_path, precision):
    """Experts that no token of the prompt goes to get NaN weights (scales, in int8) in the bundle's own files."""
    checkpoint, original = engines("limited", precision, "exact")
    out = shutil.copytree(original, tmp_path / "poisoned")
    (tokens,) = checkpoints.random_tokens([2], seed=3)
    manifest = json.loads((out / "manifest.json").read_text())
    (tensors,) = (s["tensors"] for s in manifest["weight_sets"].values())
    poisoned = 0
    rounded = dequantized(checkpoint, original, tmp_path / "dequantized") if precision == "int4" else checkpoint
    for layer, chosen in chosen_experts(rounded, tokens).items():  # 4 bits change the choice
        suffix = "" if precision == "fp32" else ".scale"
        for part in ("gate_up_proj", "down_proj"):
            entry = tensors[f"model.layers.{layer}.mlp.experts.{part}{suffix}"]
            shape = tuple(entry["shape"])
            array = np.memmap(out / "files" / entry["file"], np.float32, "r+", entry["offset"], shape)
            for expert in set(range(8)) - chosen:
                array[expert] = np.nan
                poisoned += 1
            array.flush()
    assert poisoned >= 4
    pages = ragged.Pages([2], PAGE_SIZE)
    results = []
    for folder in (original, out):
        (logits,) = ragged.run(ragged.engine_step(load(folder, pages)), [tokens], [], pages)
        results.append(logits)
    np.testing.assert_array_equal(*results)
    assert np.isfinite(results[0]).all()


def test_logits_of_chosen_rows_only(engines):
    _, out = engines()
    pages = ragged.Pages([12], PAGE_SIZE)
    inputs = ragged.batch(checkpoints.random_tokens([12]), [0], pages.table)
    full = ragged.engine_step(load(out, pages))(inputs)
    some = ragged.engine_step(load(out, pages))(inputs | {"logit_rows": np.array([11, 0, 5, 5], np.int32)})
    np.testing.assert_allclose(some, full[[11, 0, 5, 5]], rtol=0, atol=FP32_TOLERANCE)


def test_pages_of_the_default_size(fast_trace, tmp_path):
    """64 tokens a page, as a build makes them: 150 tokens, decoded over both page borders and past YaRN's context."""
    checkpoint, out = checkpoints.write(tmp_path / "checkpoint", seed=4, num_hidden_layers=2), tmp_path / "bundle"
    build(checkpoint, out, "cpu", "fp32")
    lengths = [150, 70]
    sequences, pages = checkpoints.random_tokens(lengths), ragged.Pages(lengths, 64)
    found = ragged.run(ragged.engine_step(load(out, pages)), sequences, [[60, 63], *[[1, 1]] * 6, [61, 0]], pages, (1, 0))
    assert worst(found, expected(checkpoint, sequences)) < FP32_TOLERANCE
