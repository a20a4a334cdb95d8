"""Program: runs TensorRT plugins' enqueue through the real cuda.bindings onto tests/plugins/libcuda_standin.c.

`python -m tests.plugins.recorded_launches CASES.json`, with the stand-in as libcuda.so.1 on LD_LIBRARY_PATH. Prints one JSON
list: per case the workspace that the plugin asks for, and what it did to the driver.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import tensorrt_rtx as trt

from latentrt.plugins import ops, trt_base
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.compile import CompiledKernel
from latentrt.plugins.launch.cuda import CudaLauncher

_TYPES = {"bfloat16": trt.bfloat16, "float32": trt.float32, "int32": trt.int32, "float8_e4m3fn": trt.fp8,
          "float16": trt.float16, "int8": trt.int8}  # fmt: skip
_SIZES = {"i32": 4, "fp32": 4}


class StoredKernel(CompiledKernel):
    cubin = b"not machine code, and the stand-in does not look"


def declare(library, kernels: list[StoredKernel]) -> None:
    """Tells the stand-in each kernel's arguments."""
    for kernel in kernels:
        sizes = [_SIZES.get(kind, 8) for _, kind in kernel.metadata["parameters"]] + [8, 8]
        library.standin_declare(kernel.name.encode(), len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def run(case: dict, log: Path) -> dict:
    kernels = [StoredKernel(Path("none"), metadata) for metadata in case["kernels"]]
    declare(ctypes.CDLL("libcuda.so.1"), kernels)
    target = Gpu(case["capability"], case["num_sms"])
    launcher = CudaLauncher(target, {k.spec: k for k in kernels})
    op = next(op for op in ops.plugins().values() if op.contract.name == case["op"])
    creator = trt_base._creator(trt, op, target.capability, launcher)
    fields = [trt_base._field(trt, k, type(v), v) for k, v in case["attributes"].items()]  # a collection keeps none alive
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin(case["op"], collection, trt.TensorRTPhase.RUNTIME).clone()
    inputs, outputs = ([tensor(t) for t in case[k]] for k in ("inputs", "outputs"))
    workspace = plugin.get_workspace_size([dynamic(t) for t in inputs], [dynamic(t) for t in outputs])
    plugin.on_shape_change(inputs, outputs)
    loaded = len(log.read_text().splitlines())
    addresses = [[t["address"] for t in case[k]] for k in ("inputs", "outputs")]
    plugin.enqueue(inputs, outputs, *addresses, case["workspace"], case["stream"])
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    more = [longer(t, spec) for t, spec in zip(inputs, op.contract.inputs, strict=False)]
    for given, shift in ((more, 4096), (inputs, 0)):  # a step of another shape and elsewhere, and back
        log.write_text("")
        plugin.on_shape_change(given, outputs)
        moved = [[a + shift for a in part] for part in addresses]
        plugin.enqueue(given, outputs, *moved, case["workspace"] + shift, case["stream"])
    again = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("")
    return {"workspace": workspace, "loading": calls[:loaded], "calls": calls[loaded:], "again": again}


def longer(given: SimpleNamespace, spec) -> SimpleNamespace:
    """The tensor with twice the tokens."""
    dims = zip(given.dims, spec.dims_of(len(given.dims)), strict=True)
    return SimpleNamespace(dims=[n * 2 if name == "T" else n for n, name in dims], type=given.type)


def tensor(given: dict) -> SimpleNamespace:
    return SimpleNamespace(dims=given["shape"], type=_TYPES[given["dtype"]])


def dynamic(desc: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(desc=desc, min=desc.dims, max=desc.dims)


if __name__ == "__main__":
    log = Path(os.environ["CUDA_STANDIN_LOG"])
    log.write_text("")
    print(json.dumps([run(case, log) for case in json.loads(Path(sys.argv[1]).read_text())]))
