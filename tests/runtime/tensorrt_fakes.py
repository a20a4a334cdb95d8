"""Stand-ins that record: a TensorRT package, a GPU, and a bundle with a target for them."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from latentrt.plugins.step_graph import INPUTS, StepBatch, input_shapes
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.backends.tensorrt import backend as tensorrt
from latentrt.runtime.bundle import manifest as records
from latentrt.runtime.bundle.reader import FILES, MANIFEST, Bundle

LAYERS, PAGE, WIDTH, VOCAB, HIDDEN, VERSION = 2, 64, 80, 32, 16, "1.7.1.116"
BATCH = {"input_ids": 1, "positions": 1, "query_starts": 1, "cached_lengths": 1, "block_table": 2, "num_tokens": 1,
         "logit_rows": 1}  # fmt: skip
WEIGHTS = ["a.weight", "b.weight"]
USER_MANAGED = "user managed"
EXPANDED_PLAN = b"expanded plan"
CONFIG = {"vocab_size": VOCAB, "n_routed_experts": 16, "kv_lora_rank": 64,
          "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
TABLE = np.arange(1, 13).reshape(3, 4)
CACHES = [f"latent_cache.{i}" for i in range(LAYERS)]


class FakeDevice:
    """A GPU whose memory is numbers. `log` holds what was asked for, in order."""

    name, driver_version, num_sms, capability, index, free = "Fake GPU", 13000, 100, 89, 0, 8 << 30

    def __init__(self):
        self.log, self.blocks, self.next, self.uploaded = [], {}, 1 << 20, {}

    def activate(self):
        self.active = True

    def free_memory(self):
        return self.free - sum(self.blocks.values())

    def allocate(self, size):
        address = self.next
        self.blocks[address] = size
        self.next += -(-max(size, 1) // 256) * 256 + 256
        return address

    def zero(self, address, size, stream=0):
        self.log.append(("zero", address, size, stream))

    def copy(self, target, source, size, stream):
        self.log.append(("copy", target, source, size, stream))

    def upload(self, address, array):
        self.uploaded[address] = bytes(array)

    def upload_async(self, address, array, stream):
        self.log.append(("upload", address, array.copy()))

    def download(self, array, address, stream):
        array[...] = 1.5
        self.log.append(("download", address, array.shape))

    def pinned(self, elements):
        return np.full(elements, -1, np.int32)

    def stream(self):
        return 7

    def synchronize(self, stream=0):
        self.log.append(("synchronize", stream))

    def capture(self, stream, enqueue):
        self.log.append(("begin capture",))
        enqueue()
        self.log.append(("end capture",))
        return f"graph {len(self.log)}"

    def launch(self, graph, stream):
        self.log.append(("launch", graph))

    def close(self):
        self.blocks.clear()
        self.log.append(("close",))


# Methods and class attributes of these are the packages' own: tests/runtime/test_tensorrt_bindings.py compares them.


class FullContext:
    """IExecutionContext of full TensorRT. `strategies`: of memory, and of kernels with TensorRT-RTX."""

    def __init__(self, engine, strategies):
        self.of, self.device, self.strategies, self.runs = engine, engine.device, strategies, 0
        self.addresses, self.shapes, self.profile, self.memory, self.communicator = {}, {}, None, None, None
        engine.contexts.append(self)

    def set_device_memory(self, memory, size):
        self.memory = (memory, size)

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_communicator(self, communicator):
        self.communicator = communicator
        return True

    def execute_async_v3(self, stream):
        assert self.strategies[0] != USER_MANAGED or self.memory, "no memory for activations"
        self.runs += 1
        self.device.log.append(("execute", self.profile, dict(self.shapes), dict(self.addresses), stream, self))
        return True


class RtxContext(FullContext):
    capturable = True

    def is_stream_capturable(self, stream):
        return self.capturable


class FullConfig:
    """IRuntimeConfig of full TensorRT; as with the real one, other attributes cannot be set."""

    __slots__ = ("_memory",)

    def __init__(self):
        self._memory = "static"

    def set_execution_context_allocation_strategy(self, strategy):
        self._memory = strategy

    @property
    def strategies(self):
        return (self._memory,)


class RtxConfig(FullConfig):
    __slots__ = ("_engine", "cache", "dynamic_shapes_kernel_specialization_strategy")

    def __init__(self, engine):
        super().__init__()
        self._engine, self.cache, self.dynamic_shapes_kernel_specialization_strategy = engine, None, "lazy"

    def create_runtime_cache(self):
        return self._engine.cache

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True

    @property
    def strategies(self):
        return self._memory, self.dynamic_shapes_kernel_specialization_strategy


class FullEngine:
    """ICudaEngine of full TensorRT."""

    device_memory_size_v2 = 5000

    def __init__(self, device, extra=(), profiles=2):
        self.device, self.profiles, self.contexts = device, profiles, []
        self.tensors = [*BATCH, *CACHES, *(f"{c}.updated" for c in CACHES), *WEIGHTS, "logits", "last_hidden", *extra]

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    @property
    def num_optimization_profiles(self):
        return self.profiles

    def get_tensor_name(self, index):
        return self.tensors[index]

    def get_aliased_input_tensor(self, name):
        return name.removesuffix(".updated")

    def create_runtime_config(self):
        return FullConfig()

    def create_execution_context(self, given="static"):
        return FullContext(self, given.strategies if isinstance(given, FullConfig) else (given,))


class FakeEngine(FullEngine):
    """ICudaEngine of TensorRT-RTX, which compiles where it runs."""

    def __init__(self, device, extra=(), profiles=2):
        super().__init__(device, extra, profiles)
        self.cache = FakeCache()

    def create_runtime_config(self):
        return RtxConfig(self)

    def create_execution_context(self, given="static"):
        return RtxContext(self, given.strategies if isinstance(given, FullConfig) else (given, "lazy"))


class FakeCache:
    """IRuntimeCache of TensorRT-RTX."""

    def __init__(self, content=b"compiled"):
        self.content, self.given = content, None

    def serialize(self):
        return self.content

    def deserialize(self, content):
        self.given = content
        return True


FULL = {"ICudaEngine": FullEngine, "IExecutionContext": FullContext, "IRuntimeConfig": FullConfig}
RTX = {"ICudaEngine": FakeEngine, "IExecutionContext": RtxContext, "IRuntimeConfig": RtxConfig, "IRuntimeCache": FakeCache}
NOT_THEIRS = {"strategies", "capturable", "cache"}  # what fakes have for tests


def package(engine, version=VERSION, expanded=None, full=False):
    """A module such as tensorrt_rtx that gives `engine`, and `expanded` for the expanded plan; None: it refuses the plan."""
    logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
    runtime = type("Runtime", (), {
        "__init__": lambda self, logger: None,
        "deserialize_cuda_engine": lambda self, plan: expanded if plan == EXPANDED_PLAN else engine,
    })  # fmt: skip
    module = SimpleNamespace(
        __name__="fake_tensorrt", __version__=version, Logger=logger, Runtime=runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(STATIC="static", USER_MANAGED=USER_MANAGED),
    )  # fmt: skip
    if not full:
        module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy", NONE="none")
    return module


def install(monkeypatch, module):
    """Makes `module` both TensorRT packages."""
    real = tensorrt.importlib.import_module
    names = ("tensorrt_rtx", "tensorrt")
    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda n: module if n in names else real(n))


def decode_batch(count: int) -> StepBatch:
    """One token for each of the first `count` sequences of TABLE."""
    return pack([SequenceRows([5 + i], 3 * i, [0]) for i in range(count)], TABLE[:count])


class Builder:
    """Writes a bundle whose target sm89 holds a plan, a kernel and a shard of weights; nothing in them is real."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / FILES).mkdir(parents=True)

    def add(self, suffix: str, content: bytes) -> records.FileRef:
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / FILES / f"{digest[:40]}{suffix}").write_bytes(content)
        return records.FileRef(file=f"{digest[:40]}{suffix}", size=len(content), sha256=digest)

    def write(self, backend: str = "tensorrt_rtx", expanded: bool = False, **changes) -> Bundle:
        """changes: fields of the target that differ."""
        shard = self.add(".safetensors", bytes(range(256)) * 4)
        stored = {n: records.WeightTensor(file=shard.file, offset=64 + 128 * i, dtype="bfloat16", shape=[8, 8])
                  for i, n in enumerate(WEIGHTS)}  # fmt: skip
        target = self.target(backend, expanded).model_copy(update=changes)
        stored_as = records.WeightFormat(name="bf16", plain="bfloat16")
        weights = records.WeightSet(format=stored_as, gate_up_layout="concatenated", files=[shard], tensors=stored)
        manifest = records.Manifest(
            format_version=records.FORMAT_VERSION, producer="test", created="now", family="deepseek_v2",
            config=CONFIG, checkpoint=records.CheckpointInfo(path="/", storage="", digest="0", files={}), text=records.Text(),
            weight_sets={"w": weights}, targets={"sm89": target},
        )  # fmt: skip
        (self.folder / MANIFEST).write_text(manifest.model_dump_json())
        return Bundle(self.folder)

    def target(self, backend: str, expanded: bool) -> records.Target:
        cubin = self.add(".cubin", b"machine code")
        spec = dict(op="moe_route", function="route", arguments=[["x", "*fp32"]], constexprs=[["K", 6]], num_warps=4,
                    num_stages=1, grid="(1,)")  # fmt: skip
        manifest = self.add(".json", json.dumps({"spec": spec, "sha256": cubin.sha256, "name": "route"}).encode())
        profiles = {name: self.profile(rows) for name, rows in (("decode", 8), ("prefill", 128))}
        outputs = [("logits", "float", VOCAB), ("last_hidden", "bfloat16", HIDDEN)]
        return records.Target(
            backend=backend, backend_version=VERSION, compute_capability="sm89", precision="bf16", options={},
            engines={"absorbed": records.EngineFiles(graph=self.add(".plan", b"plan"), profiles=profiles)}
            | ({"expanded": self.expanded(profiles)} if expanded else {}), weight_set="w", built_from="r", executed=None,
            kernels=[records.Kernel(op="moe_route", function="route", cubin=cubin, manifest=manifest)],
            inputs=[], outputs=[records.TensorInfo(name=n, dtype=d, shape=["N", w]) for n, d, w in outputs]
            + [records.TensorInfo(name=f"{c}.updated", dtype="bfloat16", shape=["num_pages", PAGE, WIDTH]) for c in CACHES],
            weight_inputs=WEIGHTS,
            cache=records.CacheSpec(format="bfloat16", dtype="bfloat16", page_size=PAGE, width=WIDTH, layers=LAYERS,
                                    bytes_per_token=2 * WIDTH * LAYERS, fields=[]),
            limits=records.Limits(max_context=2048, max_batch_tokens=128, max_sequences=8),
        )  # fmt: skip

    def profile(self, rows: int) -> dict[str, records.ShapeRange]:
        """Shapes of steps of up to `rows` rows, 8 sequences and 32 pages each."""
        bounds = [{"T": t, "B": b, "N": b, "max_pages": p} for t, b, p in ((1, 1, 1), (1, 4, 4), (rows, 8, 32))]
        shapes = {name: [list(s[name]) for s in map(input_shapes, bounds)] for name in INPUTS if name != "num_tokens"}
        shapes |= {c: [[n, PAGE, WIDTH] for n in (2, 9, 100)] for c in CACHES}
        return {name: records.ShapeRange(min=low, opt=usual, max=high) for name, (low, usual, high) in shapes.items()}

    def expanded(self, profiles: dict) -> records.EngineFiles:
        graph, onnx, network = self.add(".plan", EXPANDED_PLAN), self.add(".onnx", b"expanded"), self.add(".json", b"[]")
        return records.EngineFiles(graph=graph, onnx=onnx, network=network, profiles={"prefill": profiles["prefill"]})
