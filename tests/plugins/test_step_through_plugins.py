"""A whole step through the TensorRT plugins' own classes: what their enqueue launches runs in Triton's interpreter.

The step graph is the torch backend's, with every custom op handed to its plugin as TensorRT does it: descriptions and shapes
first, then addresses of host memory. The launcher is a stand-in that runs a plan's kernels on those addresses.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentrt.export.quantization import BFloat16Int4, Fp8
from latentrt.plugins import ops, trt_base
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch import interpreter
from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.forms import FormChooser
from latentrt.runtime.backends.torch import custom_ops
from latentrt.runtime.backends.torch.graph import StepProgram
from latentrt.runtime.backends.torch.step import StepRunner
from tests import gpu_graphs, ragged
from tests.conftest import EXAMPLE

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: the plugins are its classes")

pytestmark = pytest.mark.slow

POINTERS = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32,
            "*fp8e4nv": torch.float8_e4m3fn, "*i8": torch.int8}  # fmt: skip
LENGTHS = [5, 2, 66, 1]
SCHEDULE = [[4, 2, 65, 1]]  # prompts, then two that decode
FORMATS = {"fp8": Fp8(), "bf16-int4": BFloat16Int4(64)}
# Of errors: the median, and nine tenths. Activations in e4m3 round by 6 %; those of int4 experts stay bf16.
LIMITS = {"bf16": (0.02, 0.1), "fp8": (0.08, 0.3), "bf16-int4": (0.02, 0.1)}


class HostLauncher:
    """Launches plans on host memory, in the interpreter."""

    def __init__(self, target: Gpu):
        self.target, self.launched = target, 0

    def prepare(self, kernels) -> None:
        self.known = set(kernels)

    def ready(self, plan, names):
        assert set(plan.kernels) <= self.known, "a kernel that nobody loaded"

        def call(addresses, workspace, stream):
            known = plan.addresses(dict(zip(names, addresses, strict=True)), workspace)
            interpreter.repair()
            for launch in plan.launches:
                kinds = dict(launch.kernel.arguments)
                values = dict(zip(kinds, launch.values(known), strict=True))
                given = {n: at(v, POINTERS[kinds[n]]) if kinds[n] in POINTERS else v for n, v in values.items()}
                function = getattr(ops.part(launch.kernel.op, "kernel"), launch.kernel.function)
                function[launch.grid](**given, **dict(launch.kernel.constexprs))
                self.launched += 1

        return call


def at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins there; kernels ask for nothing but its address and type."""
    return torch.frombuffer((ctypes.c_byte * dtype.itemsize).from_address(address), dtype=dtype)


def through_plugin(contract, launcher: HostLauncher, made: list):
    """The op as a function of torch tensors, as the torch backend's table has it."""
    op = next(op for op in ops.plugins().values() if op.contract is contract)
    plugin_class = trt_base._plugin_class(trt, op, launcher)
    kept = {}

    def call(*tensors, **attributes):
        attributes = contract.with_defaults(attributes)
        key = tuple(sorted(attributes.items()))
        if key not in kept:
            plugin = plugin_class(attributes, launcher.target.capability)
            kept[key] = plugin.clone()
            made.append(kept[key])
        plugin, inputs = kept[key], [t.contiguous() for t in tensors if t is not None]
        described = [described_as(plugin, t) for t in inputs]
        named = trt_base.sizes(contract, [t.dims for t in described], attributes) | attributes
        outputs = [output(plugin, o, named, inputs, contract) for o in contract.outputs]
        ranges = [SimpleNamespace(desc=d, min=d.dims, max=d.dims) for d in described]
        workspace = torch.full((plugin.get_workspace_size(ranges, []) + 256,), 0xFF, dtype=torch.uint8)
        plugin.on_shape_change(described, [None] * len(outputs))
        begin = -(-workspace.data_ptr() // 256) * 256
        plugin.enqueue(described, [], [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs], begin, 5)
        aliased = {o for o, _ in contract.aliases}
        fresh = [t for t, o in zip(outputs, contract.outputs, strict=True) if o.name not in aliased]
        return fresh[0] if len(fresh) == 1 else tuple(fresh)

    return call


def described_as(plugin, tensor: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(dims=tuple(tensor.shape), type=plugin.types[str(tensor.dtype).removeprefix("torch.")])


def output(plugin, spec, named: dict, inputs: list, contract) -> torch.Tensor:
    """A new tensor of the output's shape and type, or the input that it aliases."""
    names = [i.name for i in contract.inputs]
    for out, given in contract.aliases:
        if out == spec.name:
            return inputs[names.index(given)]
    like = inputs[names.index(spec.like)].dtype if spec.like else spec.dtype
    return torch.full([named[d] for d in spec.dims], 77, dtype=torch.float32).to(like)


@pytest.mark.parametrize(
    ("form", "precision"),
    [("expanded", "bf16"), ("absorbed", "fp8"), pytest.param("absorbed", "bf16-int4", marks=pytest.mark.deep)],
)
def test_a_step_through_plugins_equals_the_references(traced, form, precision, monkeypatch):
    graph = gpu_graphs.bfloat16(EXAMPLE, traced, form)
    if precision in FORMATS:
        graph = gpu_graphs.quantized(graph, EXAMPLE, scheme=FORMATS[precision])
    proto, weights, c = graph
    tokens = [np.random.default_rng(n).integers(0, 320, length).tolist() for n, length in enumerate(LENGTHS)]
    launcher, plugins, found = HostLauncher(Gpu.of(89)), [], {}
    for how in ("reference", "plugins"):
        if how == "plugins":
            monkeypatch.setattr(custom_ops, "_function", lambda contract, kind: through_plugin(contract, launcher, plugins))
        width, pages = c.kv_lora_rank + c.qk_rope_head_dim, ragged.Pages(LENGTHS, 64)
        caches = {f"latent_cache.{i}": torch.full((pages.num_pages, 64, width), float("nan"), dtype=torch.bfloat16)
                  for i in range(c.num_hidden_layers)}  # fmt: skip
        program = StepProgram(proto, weights, "cpu", "reference")
        runner = StepRunner({"absorbed": program}, caches, FormChooser(("absorbed",)))
        step = lambda i, r=runner: r.step(StepBatch(**i)).logits().copy()  # noqa: E731
        found[how] = np.concatenate(ragged.run(step, tokens, SCHEDULE, pages, padding=(0, 2))), caches
    expected, ours = found["reference"][0], found["plugins"][0]
    errors = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    middle, most = LIMITS[precision]
    assert np.median(errors) <= middle and np.quantile(errors, 0.9) <= most  # what differs rounds; a router's near tie may flip
    for name, cache in found["plugins"][1].items():
        assert torch.equal(cache.isnan(), found["reference"][1][name].isnan()), "the same cells are written"
    assert launcher.launched > 3 * len(plugins) and {p.plugin_name for p in plugins} >= {"MoeRoute", "MoeExperts"}
