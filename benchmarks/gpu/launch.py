"""The plugins' launch path: plans made as a plugin's enqueue makes them, cubins launched through cuda.bindings.

Results must equal, bit for bit, what the same kernels give through Triton's own launcher; in a captured stream too. Cubins
of another Triton than this machine's, which the cache of kernels may hold, must agree to rounding.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import torch

from benchmarks.gpu import ahead, attention, experts, prefill
from benchmarks.gpu.run import Run, relative_error
from latentrt.plugins import ops
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.compile import CompiledKernel, compile_in_child
from latentrt.plugins.launch.cuda import CudaLauncher
from latentrt.plugins.launch.plan import Plan
from latentrt.plugins.trt_base import PluginOp, sizes

ATTENTION = dict(softmax_scale=attention.SCALE, cache_format="bfloat16")
ROUNDING = 3e-2  # relative error between two compilers' machine code: FP8 rows may round to their other side


def check(run: Run) -> None:
    """Every op on V2-Lite's and V2's shapes. Without a GPU: a stand-in driver counts launches."""
    launcher = _launcher(run)
    by_name = {op.contract.name: op for op in ops.plugins().values()}
    calls = [
        (f"{name} {op_name}", by_name[op_name], tensors, attributes)
        for name, cases in _cases(run).items()
        for op_name, tensors, attributes in cases
    ]
    plans = [_plan(op, tensors, attributes, launcher.target) for _, op, tensors, attributes in calls]
    specs = list(dict.fromkeys(spec for _, _, plan in plans for spec in plan.kernels))
    launcher.kernels.update(zip(specs, _kernels(run, specs, launcher.target.capability), strict=True))
    for call, planned in zip(calls, plans, strict=True):
        if not run.late(call[0]):
            _check_one(run, launcher, *call, *planned)


def _launcher(run: Run) -> CudaLauncher:
    if run.device.type != "cuda":
        return CudaLauncher(Gpu.of(90), {}, driver=_StandIn())
    properties = torch.cuda.get_device_properties(run.device)
    return CudaLauncher(Gpu.of(properties.major * 10 + properties.minor, properties.multi_processor_count), {})


def _cases(run: Run) -> dict[str, list[tuple[str, list, dict]]]:
    """Per model: (op, tensors, attributes)."""
    found = {}
    for name, (count, hidden, inner, top_k, routing) in (experts.DRY_SHAPES if run.dry else experts.SHAPES).items():
        heads, narrow = (128 if name == "V2" else 16), (dict(rank=64, rope=16) if run.dry else {})
        mixed = attention.batch(run, [7, 1, 0, 33], [5, 300, 3, 130], heads, torch.bfloat16, **narrow)
        decode = attention.batch(run, [1] * 4, [0, 63, 64, 5000 if not run.dry else 100], heads, torch.bfloat16, **narrow)
        calls = [("mla_attention", batch, ATTENTION) for batch in (mixed, decode)]
        chunks = prefill.inputs(run, [200, 0, 70], [5 if run.dry else 5000, 9, 300], heads, torch.bfloat16)
        calls.append(("mla_prefill", chunks, ATTENTION))  # several segments at 128 heads
        logits = torch.randn(9, count, device=run.device)
        tokens = torch.tensor([8], dtype=torch.int32, device=run.device)
        options = dict(scoring_func="softmax", group_score="max", top_k=top_k, norm_topk_prob=0) | routing
        calls.append(("moe_route", [logits, tokens, None], options))
        for kind in experts.KINDS:
            gate_up = experts._weights(run, (count, 2 * inner, hidden), kind)
            down = experts._weights(run, (count, hidden, inner), kind)
            ids, weights = experts._routing(run, "random", 9, count, top_k)
            tensors = [run.randn(9, hidden), ids, weights, gate_up[0], down[0], gate_up[1], down[1]]
            calls.append(("moe_experts", tensors, experts._attributes(gate_up[0])))
        found[name] = calls
    return found


def _plan(op: PluginOp, tensors: list, attributes: dict, target: Gpu) -> tuple:
    """Sizes by name, the op's static configuration and its plan, as a plugin's enqueue finds them."""
    names = [s.name for s in op.contract.inputs]
    words = {n: str(t.dtype).removeprefix("torch.") for n, t in zip(names, tensors, strict=False) if t is not None}
    dims = sizes(op.contract, [t.shape for t in tensors if t is not None], attributes)
    config = op.configure(attributes, dims, words)
    return dims, config, op.plan(config, dims, target)


def outputs_and_plan(op_name: str, tensors: list, attributes: dict, target: Gpu) -> tuple[dict, dict, Plan]:
    """An op's inputs and poisoned outputs by name, and its plan."""
    op = ops.part(op_name, "trt").OP
    dims, _, plan = _plan(op, tensors, attributes, target)
    named = {s.name: t for s, t in zip(op.contract.inputs, tensors, strict=False) if t is not None}
    return named, _poisoned(op, named, attributes, dims), plan


def _check_one(run: Run, launcher: CudaLauncher, label: str, op: PluginOp, tensors, attributes, dims, config, plan) -> None:
    named = {s.name: t for s, t in zip(op.contract.inputs, tensors, strict=False) if t is not None}
    launcher.prepare(plan.kernels)
    allowed = op.workspace(config, dims, launcher.target)
    run.check(f"{label}: workspace bytes over what the plugin asks for", max(0, plan.workspace_bytes - allowed), 0)
    if run.device.type != "cuda":
        launcher.run(plan, {n: 1 << 20 for n in (*named, *(o.name for o in op.contract.outputs))}, 1 << 20, 0)
        run.check(f"{label}: launches that are missing", launcher._driver.left(len(plan.launches)), 0)
        return
    expected = _through_triton(op, tensors, attributes)
    outputs = _poisoned(op, named, attributes, dims)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=run.device)
    addresses = {n: t.data_ptr() for n, t in (named | outputs).items()}
    makers = {launcher.kernels[spec].metadata["triton"] for spec in plan.kernels}
    for how in ("", ", captured"):
        kept = {n: t.clone() for n, t in outputs.items()}
        _launch(launcher, plan, addresses, workspace, bool(how))
        _compare(run, f"{label}{how}", outputs, expected, makers)
        for n, t in outputs.items():
            t.copy_(kept[n])


def _launch(launcher: CudaLauncher, plan, addresses: dict, workspace: torch.Tensor, capture: bool) -> None:
    def go() -> None:
        launcher.run(plan, addresses, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)

    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            go()
        graph.replay()
    else:
        go()
    torch.cuda.synchronize()


def _kernels(run: Run, specs: list, capability: int) -> list[CompiledKernel]:
    """From the cache, the rest compiled in several processes at once; without a GPU there is nothing to compile for."""
    if run.device.type == "cuda":
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            made = lambda spec: ahead.find(spec, capability) or compile_in_child([(spec, capability)])[0]  # noqa: E731
            found = list(pool.map(made, specs))
        makers = Counter(kernel.metadata["triton"] for kernel in found)
        run.measure("kernels", **{f"cubins of Triton {v}": n for v, n in makers.items()})
        return found
    common = dict(architecture=capability, shared_bytes=1 << 16, num_warps=4, num_ctas=1, global_scratch_bytes=0)
    return [_NoKernel(None, common | dict(name=s.function, profile_scratch_bytes=0)) for s in specs]


class _NoKernel(CompiledKernel):
    cubin = b""


def _through_triton(op: PluginOp, tensors: list, attributes: dict) -> dict[str, torch.Tensor]:
    """The op's outputs by name, through Triton's own launcher, on a copy of the cache."""
    import importlib

    contract = op.contract
    name = contract.name + ("_" if contract.aliases else "")
    written = {[s.name for s in contract.inputs].index(i): o for o, i in contract.aliases}
    copies = [t.clone() if i in written else t for i, t in enumerate(tensors)]
    results = getattr(importlib.import_module(f"latentrt.plugins.{contract.name}.kernel"), name)(*copies, **attributes)
    results = results if isinstance(results, tuple) else (results,)
    kept = [o.name for o in contract.outputs if o.name not in written.values()]
    return dict(zip(kept, results, strict=True)) | {o: copies[i] for i, o in written.items()}


def _poisoned(op: PluginOp, named: dict, attributes: dict, dims: dict) -> dict[str, torch.Tensor]:
    """Output tensors by name, of NaN or -7; an aliased one is its input."""
    aliases, found = dict(op.contract.aliases), {}
    known = dims | {k: v for k, v in attributes.items() if isinstance(v, int)}
    for spec in op.contract.outputs:
        if spec.name in aliases:
            found[spec.name] = named[aliases[spec.name]]
            continue
        dtype = named[spec.like].dtype if spec.like else spec.dtype
        fill = float("nan") if dtype.is_floating_point else -7
        device = next(iter(named.values())).device
        found[spec.name] = torch.full([known[d] for d in spec.dims], fill, dtype=dtype, device=device)
    return found


def _compare(run: Run, label: str, outputs: dict, expected: dict, makers: set[str]) -> None:
    """Bit for bit where `makers` is the Triton that made what is expected; caches, which are only copied, always."""
    for name, tensor in outputs.items():
        if makers == {version("triton")} or name == "cache_out" or not tensor.is_floating_point():
            different = (tensor.view(torch.uint8) != expected[name].view(torch.uint8)).sum().item()
            run.check(f"{label}: bytes of {name} that differ", different, 0)
        else:
            error = relative_error(tensor, expected[name])
            run.check(f"{label}: {name}, Triton {', '.join(sorted(makers))}", error, ROUNDING)


class _StandIn:
    """Takes the driver's calls and counts launches."""

    class CUresult:
        CUDA_SUCCESS = 0

    class CUfunction_attribute:  # noqa: N801 - the driver's name
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    launched = 0

    def __getattr__(self, name: str):
        def call(*arguments):
            self.launched += name == "cuLaunchKernel"
            return (0, len(arguments))

        return call

    def left(self, expected: int) -> int:
        missing, self.launched = expected - self.launched, 0
        return abs(missing)
