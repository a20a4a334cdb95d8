"""Ahead-of-time compilation: tuned shapes on a covering array of architectures and formats, and the cache."""

import json
import os
import struct
from pathlib import Path

import pytest
import typer

from latentrt.commands.kernels import kernels
from latentrt.plugins import cache_formats
from latentrt.plugins.architecture import ARCHITECTURES, Gpu, get
from latentrt.plugins.launch import compile as aot
from latentrt.plugins.launch import report
from latentrt.plugins.launch.report import FORMATS, MODELS, V2, V2_LITE, configs, tuned
from latentrt.plugins.mla_attention import plan as attention
from latentrt.plugins.mla_attention.tiles import TILES
from latentrt.plugins.mla_prefill import plan as prefill
from latentrt.plugins.moe_experts import plan as experts
from latentrt.plugins.moe_experts.tiles import SIZES
from latentrt.plugins.moe_route import plan as route

pytestmark = pytest.mark.slow

# every architecture with both models and two formats, every architecture that has FP8 with FP8
COVER = {80: ("bfloat16",), 86: ("float16",), 89: ("float8_e4m3fn",), 90: ("bfloat16", "float8_e4m3fn"),
         100: ("float8_e4m3fn",), 103: ("float8_e4m3fn",), 120: ("float8_e4m3fn",), 121: ("float8_e4m3fn",)}  # fmt: skip
TWINS = {103: 100, 121: 120}  # whose kernels of experts have the same tiles


def covering_requests():
    """One (spec, capability) of every kernel function per architecture: which tile and which model rotates."""
    for turn, (capability, formats) in enumerate(COVER.items()):
        for weights in formats:
            by_function = {}
            for _, spec in tuned(capability, (weights,), ()):
                by_function.setdefault(spec.function + spec.op, []).append(spec)
            for specs in by_function.values():
                yield specs[turn % len(specs)], capability
    for turn, capability in enumerate(sorted(set(ARCHITECTURES) - set(TWINS))):  # products with int4 experts, every tile
        config = configs((V2_LITE, V2)[turn % 2], "int4")["moe_experts"]
        for spec in experts.kernels(config, Gpu.of(capability)):
            if spec.function in ("gate_up", "down", "halve"):
                yield spec, capability
    for turn, capability in enumerate(TWINS):
        yield experts._gate_up_kernel(configs(V2, "int4")["moe_experts"], SIZES[turn], Gpu.of(capability)), capability
    for capability in ARCHITECTURES:  # decode and prompt chunks at 16 and 128 heads are tuned one by one
        for model in (V2_LITE, V2):
            config = configs(model, "bfloat16")["mla_attention"]
            yield attention._shares_kernel(config, "many" if model is V2 else "few", Gpu.of(capability)), capability
    for turn, capability in enumerate(ARCHITECTURES):  # every packed cache on one architecture or two, both tiles on all
        cache = cache_formats.PACKED[turn % 4]
        for model in (V2_LITE, V2):
            config, target = configs(model, "bfloat16", cache), Gpu.of(capability)
            yield attention._shares_kernel(config["mla_attention"], "many" if model is V2 else "few", target), capability
        yield attention.append_kernel(config["mla_attention"]), capability
        yield prefill._expand_kernel(config["mla_prefill"], target), capability


@pytest.fixture(scope="module")
def covering():
    requests = list(dict.fromkeys(covering_requests()))
    return aot.compile_in_child(requests)


def test_tuned_kernels_pass_the_gates(covering):
    wrong = {f"{k.name} sm_{k.metadata['architecture']}": aot.findings(k) for k in covering}
    assert not {name: found for name, found in wrong.items() if found}
    assert {k.metadata["architecture"] for k in covering} == set(ARCHITECTURES)


def test_float8_products_run_on_float8_tensor_cores(covering):
    products = [k.metadata for k in covering if k.metadata["spec"]["tensor_cores"] == "fp8"]
    assert {m["architecture"] for m in products} == {n for n, a in ARCHITECTURES.items() if a.float8}
    assert all(get(m["architecture"]).mma["fp8"] in m["instructions"] for m in products)


def test_int4_weights_are_copied_by_many_bytes_at_once(covering):
    """A thread's copy into shared memory, some steps ahead of its product, takes 16 bytes of a row or of x, or a scale. Hopper
    takes 8 of a row where the product reads weights from registers."""
    seen = set()
    for metadata in [k.metadata for k in covering]:
        c, function = dict(metadata["spec"]["constexprs"]), metadata["spec"]["function"]
        if c.get("PACKED") == 2:
            threads, matrices = 32 * metadata["num_warps"], 2 if function == "gate_up" else 1
            weights, x, scales = (
                max(1, size // threads)
                for size in (c["BLOCK_N"] * c["BLOCK_K"] // 32, c["BLOCK_M"] * c["BLOCK_K"] // 8, c["BLOCK_N"])
            )
            halved = metadata["architecture"] == 90 and c["SWAP"]
            copies = matrices * (weights * (1 + halved) + scales) + x
            assert metadata["instructions"]["LDGSTS"] == copies * metadata["spec"]["num_stages"], (metadata["name"], c)
            seen.add(metadata["architecture"])
    assert seen == set(ARCHITECTURES)


def attend_kernels(covering):
    """(metadata, tile) of the attention kernels for shares."""
    for metadata in [k.metadata for k in covering]:
        spec, constants = metadata["spec"], dict(metadata["spec"]["constexprs"])
        if (spec["op"], spec["function"]) == ("mla_attention", "attend_shares"):
            pairs, packed = constants["ROWS"] * constants["BLOCK_H"], constants["FORMAT"] in cache_formats.PACKED
            tiles = [t for name, t in TILES[metadata["architecture"]].items() if name.endswith(".packed") == packed]
            (tile,) = (t for t in tiles if t.block_m == pairs)
            yield metadata, tile


def test_as_many_attention_programs_fit_a_multiprocessor_as_plans_assume(covering):
    seen = set()
    for metadata, tile in attend_kernels(covering):
        capability, registers = metadata["architecture"], -(-metadata["registers"] // 8) * 8 * 32 * tile.warps
        shared = (get(capability).shared_bytes + 1024) // (metadata["shared_bytes"] + 1024)  # a block's KiB is the system's
        assert min(shared, 65536 // registers) == tile.ctas, (capability, tile)
        seen.add((capability, tile.block_m, metadata["spec"]["arguments"][2][1] == "*i32"))
    assert len(seen) == 4 * len(ARCHITECTURES)


def test_hopper_computes_scores_once(covering):
    counts = {m["instructions"]["HGMMA"] for m, tile in attend_kernels(covering) if tile.unchain}
    assert counts == {576 // 16 + 2}  # 74 where both warp groups compute all rows


def test_manifest_says_what_a_launcher_needs(covering):
    for kernel in covering:
        metadata = json.loads(kernel.manifest.read_text())
        assert metadata["num_ctas"] == 1 and metadata["global_scratch_bytes"] == metadata["profile_scratch_bytes"] == 0
        assert kernel.cubin[:4] == b"\x7fELF" and metadata["name"].encode() in kernel.cubin
        assert aot.load(kernel.spec, metadata["architecture"]).path == kernel.path
        assert metadata["parameters"] == metadata["spec"]["arguments"] and metadata["pointer_alignment"] == 16


def test_example_model_fits_small_gpus():
    attend = attention.Attention(6, 64, 16, 64, "bfloat16", "bfloat16", 0.1)
    expanded = prefill.Prefill(6, 64, 32, 16, 32, 64, "bfloat16", "bfloat16", 0.1)
    for capability, weights in ((86, "bfloat16"), (120, "float8_e4m3fn")):
        target = Gpu.of(capability)
        ffn = experts.Experts(16, 192, 64, 4, "bfloat16", weights, 0, "concatenated")
        router = route.Routing(16, "softmax", "group_limited_greedy", "max", 4, 2, 4, 0, 2.5, False)
        specs = [*attention.kernels(attend, target), *experts.kernels(ffn, target), *route.kernels(router, target)]
        specs += prefill.kernels(expanded, target)
        for kernel in aot.compile_in_child(dict.fromkeys((s, capability) for s in specs)):
            assert not aot.findings(kernel)


def smallest():
    return attention._combine_kernel(configs(V2_LITE, "bfloat16")["mla_attention"], "few", 2, Gpu.of(89))


def test_cache_is_used_and_content_addressed(tmp_path, monkeypatch):
    (kernel,) = aot.compile_in_child([(smallest(), 89)], tmp_path)
    before = kernel.path.stat()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".cubin", ".json"]
    assert aot.compile_kernel(smallest(), 89, tmp_path).path.stat().st_mtime_ns == before.st_mtime_ns
    assert aot.load(smallest(), 90, tmp_path) is None
    name = aot.digest(smallest(), 89)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/usr/local/cuda/bin/ptxas")
    assert aot.digest(smallest(), 89) != name


def test_the_child_finds_package_and_cache_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (kernel,) = aot.compile_in_child([(smallest(), 89)], Path("kernels"))
    assert kernel.path.parent == tmp_path / "kernels" and kernel.path.exists() and kernel.spec == smallest()


def test_digest_covers_what_kernels_share(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "PLUGINS", tmp_path)
    (tmp_path / "op").mkdir()
    (tmp_path / "launch").mkdir()
    files = [tmp_path / name for name in ("launch/compile.py", "op/kernel.py", "shared_kernel.py", "op/plan.py")]
    found = []
    for file in (*files, *files):
        file.write_text(f"{len(found)}")
        if all(f.exists() for f in files):
            found.append(aot._sources_digest.__wrapped__("op"))
    assert len(set(found)) == 4 and found[-1] == found[-2]  # a plan is in the spec that it makes, not in the sources


def test_report_says_how_far_it_is(capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(report, "PROGRESS_SECONDS", 0)
    assert list(report._watched(iter("abc"), 3, Console(force_terminal=False))) == list("abc")
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 3 kernels"


def test_the_command_names_architectures(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(report, "report", lambda *arguments: asked.append(arguments) or len(asked) - 1)
    assert [kernels(arch=[90, 89, 90], jobs=2, cache=tmp_path), kernels(every=True)] == [0, 1]
    assert asked[0] == ((90, 89), 2, tmp_path) and asked[1][0] == tuple(ARCHITECTURES)
    for wrong, words in (([], "--arch"), ([90, 91], "91, accepted: 80, 86")):
        with pytest.raises(typer.BadParameter, match=words):
            kernels(arch=wrong)


def test_nothing_is_compiled_in_a_process_that_interprets(tmp_path):
    assert os.environ["TRITON_INTERPRET"] == "1"
    with pytest.raises(RuntimeError, match="compile_in_child"):
        aot.compile_kernel(smallest(), 89, tmp_path)


def test_a_failing_compilation_says_why(tmp_path):
    fields = smallest().__dict__ | {"constexprs": tuple((dict(smallest().constexprs) | dict(RANK=500, BLOCK_D=500)).items())}
    with pytest.raises(RuntimeError, match="power of 2"):
        aot.compile_in_child([(type(smallest())(**fields), 89)], tmp_path)


def test_gates_find_what_is_wrong(tmp_path):
    spec = {"tensor_cores": "fp8", "spills_because": ""}
    metadata = {"architecture": 89, "shared_bytes": 120_000, "stack_bytes": 8, "instructions": {"LDL": 2}, "spec": spec}
    found = aot.findings(aot.CompiledKernel(tmp_path, metadata))
    assert [f.split(":")[0] for f in found] == ["shared memory", "tensor cores", "spills"]


def test_spec_survives_json():
    from dataclasses import asdict

    for _, spec in tuned(90, FORMATS[:1], ()):
        assert aot.spec_from_json(json.loads(json.dumps(asdict(spec)))) == spec
    assert set(MODELS) == {"V2", "V2-Lite"}


def test_cubins_take_the_parameters_that_launchers_pass(covering):
    """By the table in the cubin itself: so many, of these sizes, one after another, then Triton's two scratch pointers."""
    sizes = {"i32": 4, "fp32": 4, "i64": 8, "fp64": 8}
    for kernel in covering:
        expected, offset = [], 0
        for kind in (*(kind for _, kind in kernel.metadata["parameters"]), "*", "*"):
            size = sizes.get(kind, 8)
            offset = -(-offset // size) * size
            expected.append((offset, size))
            offset += size
        assert parameters(kernel.cubin, kernel.name) == expected, kernel.name


def parameters(cubin: bytes, name: str) -> list[tuple[int, int]]:
    """Offset and size of a kernel's parameters: EIATTR_KPARAM_INFO (0x17) of section .nv.info.<name>, an ELF64 file."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + k * size) for k in range(count)]
    found = {}
    for label, _, _, _, offset, length in sections:
        start = sections[names][4] + label
        if cubin[start : cubin.index(b"\0", start)].decode() != f".nv.info.{name}":
            continue
        at, end = offset, offset + length
        while at + 4 <= end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:  # `value` bytes follow
                if attribute == 0x17:
                    _, ordinal, place, rest = struct.unpack_from("<IHHI", cubin, at)
                    found[ordinal] = place, rest >> 18
                at += value
    return [found[k] for k in sorted(found)]
