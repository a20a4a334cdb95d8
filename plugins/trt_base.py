"""TensorRT plugins, derived from the op contracts: IPluginV3 classes for `tensorrt` and `tensorrt_rtx`, the module passed in.

A plugin serializes the op's attributes and the compute capability it was built for. When shapes change, which TensorRT says
before the step, it has a launcher (plugins/launch/cuda.py) make the plan of these shapes ready; a step hands over addresses and
does nothing else. Building needs no launcher and no GPU: without a launcher, steps do nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.contract import DOMAIN, VERSION, OpContract, terms
from latentrt.plugins.launch.plan import KernelSpec, Plan
from latentrt.plugins.step_graph import DYNAMIC

CAPABILITY = "capability"  # field beside the op's attributes: 89 for 8.9
MAX_SMS = 192  # multiprocessors that workspaces are sized for; plans of a larger GPU use this many
_SHAPES = 256  # whose plans a plugin keeps ready
_SETTLED = 4096  # plans that all plugins of an op share
_TYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int32": "int32", "float8_e4m3fn": "fp8",
          "int8": "int8"}  # fmt: skip


@dataclass(frozen=True)
class PluginOp:
    """What an op adds to its contract: each plugins/<op>/trt.py holds one, called OP.

    configure(attributes, sizes, dtypes) gives the static part of a plan; sizes are dimensions by the contract's names,
    dtypes are torch's words by tensor name, absent optional tensors left out. It raises PlanError where no kernel fits.
    plan(config, sizes, target) and kernels(config, target) are the op's own. workspace(config, sizes, target) bounds the
    workspace in bytes of every plan whose dynamic dimensions are at most `sizes`.
    """

    contract: OpContract
    configure: Callable[[Mapping, Mapping[str, int], Mapping[str, str]], Any]
    plan: Callable[[Any, Mapping[str, int], Gpu], Plan]
    kernels: Callable[[Any, Gpu], tuple[KernelSpec, ...]]
    workspace: Callable[[Any, Mapping[str, int], Gpu], int]


class Launcher(Protocol):
    """Runs plans on the current CUDA device."""

    target: Gpu

    def prepare(self, kernels: Sequence[KernelSpec]) -> None:
        """Loads kernels, so that nothing is loaded while a stream is captured."""

    def ready(self, plan: Plan, names: Sequence[str]) -> Callable[[list[int], int, int], None]:
        """What launches `plan`: called with the addresses of tensors in the order of `names`, of the workspace, a stream."""


def register(trt, ops: Iterable[PluginOp], capability: int, launcher: Launcher | None = None) -> list:
    """Registers a creator for each op with the package's registry; returns them: they must outlive builder and engine."""
    registry = trt.get_plugin_registry()
    creators = [_creator(trt, op, capability, launcher) for op in ops]
    for creator in creators:
        if not registry.register_creator(creator, DOMAIN):
            raise RuntimeError(f"{trt.__name__} does not register plugin {creator.name}: is it registered already?")
    return creators


def sizes(contract: OpContract, shapes: Sequence[Sequence[int]], attributes: Mapping | None = None) -> dict[str, int]:
    """Dimensions by name, from the shapes of the inputs that are present; in elements if `attributes` tell what packs them."""
    named, attributes = {}, attributes or {}
    for spec, shape in zip(contract.inputs, shapes, strict=False):
        for dim, size in zip(spec.dims_of(len(shape)), spec.elements(shape, attributes), strict=True):
            if dim.isidentifier():
                named.setdefault(dim, size)
    return named


def _dynamic_axes(contract: OpContract, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Where each dimension that changes between steps is seen first, for inputs of these ranks."""
    found: dict[str, tuple[int, int]] = {}
    for i, (spec, rank) in enumerate(zip(contract.inputs, ranks, strict=False)):
        for axis, dim in enumerate(spec.dims_of(rank)):
            if dim in DYNAMIC or contract.collective:
                found.setdefault(dim, (i, axis))
    return list(found.values())


def _creator(trt, op: PluginOp, capability: int, launcher: Launcher | None):
    plugin = _plugin_class(trt, op, launcher)
    kinds = {int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32, str: trt.PluginFieldType.CHAR}
    fields = [trt.PluginField(a.name, np.array([]), kinds[a.kind]) for a in op.contract.attributes]

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self):
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = op.contract.onnx_type, DOMAIN, str(VERSION)
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name, collection, phase):
            found = {f.name: f for f in collection}
            given = {a.name: _value(a.kind, found[a.name]) for a in op.contract.attributes if a.name in found}
            attributes = op.contract.with_defaults(given)
            built_for = _value(int, found[CAPABILITY]) if CAPABILITY in found else capability
            return plugin(attributes, built_for)

    return Creator()


def _value(kind: type, field):
    data = np.asarray(field.data)
    return data.tobytes().decode().rstrip("\0") if kind is str else kind(data.reshape(-1)[0])


def _plugin_class(trt, op: PluginOp, launcher: Launcher | None) -> type:
    """The IPluginV3 class of `op` for one of the two packages, whose classes it has to inherit."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)
    contract, types = op.contract, {ours: getattr(trt, theirs) for ours, theirs in _TYPES.items()}
    names = [i.name for i in contract.inputs]
    aliases = {[o.name for o in contract.outputs].index(o): names.index(i) for o, i in contract.aliases}
    static = {"trt": trt, "op": op, "launcher": launcher, "package_bases": bases, "types": types, "aliases": aliases,
              "words": {v: k for k, v in types.items()}, "input_names": names, "settled": {}}  # fmt: skip
    return type(contract.onnx_type, (_Plugin, *bases), static)


class _Plugin:
    """What every plugin does; `_plugin_class` adds the package's base classes and the attributes used here.

    types: torch's words -> the package's types; words: the other way. aliases: output -> input, by number. settled: plans by
    attributes, types, shapes and GPU, which layers share.
    """

    def __init__(self, attributes: dict, capability: int):
        for base in self.package_bases:
            base.__init__(self)
        self.plugin_name, self.plugin_namespace = self.op.contract.onnx_type, DOMAIN
        self.plugin_version, self.num_outputs = str(VERSION), len(self.op.contract.outputs)
        self.attributes, self.capability = attributes, capability
        self._plans: dict[tuple, Callable] = {}  # by shapes; of a context, whose steps run one after another
        self._ready: Callable | None = None
        self._axes: list[tuple[int, int]] | None = None  # (input, axis) of every dimension that may change between steps

    def clone(self):
        return type(self)(self.attributes, self.capability)

    def get_capability_interface(self, kind):
        return self

    def get_output_data_types(self, input_types):
        by_name = dict(zip(self.input_names, input_types, strict=False))
        return [self._output_type(o, by_name) for o in self.op.contract.outputs]

    def get_output_shapes(self, shapes, shape_inputs, expressions):
        named = sizes(self.op.contract, [list(s) for s in shapes])
        for attribute in self.op.contract.attributes:
            if attribute.kind is int:
                named[attribute.name] = expressions.constant(self.attributes[attribute.name])
        return [self.trt.DimsExprs([self._expression(d, named, expressions) for d in o.dims]) for o in self.op.contract.outputs]

    def _expression(self, dim: str, named: Mapping, expressions):
        left, operator, right = terms(dim)
        if not operator:
            return named[left]
        operation = {"*": self.trt.DimensionOperation.PROD, "/": self.trt.DimensionOperation.FLOOR_DIV}[operator]
        return expressions.operation(operation, named[left], named[right])

    def supports_format_combination(self, position, tensors, num_inputs):
        given, contract = tensors[position].desc, self.op.contract
        if given.format != self.trt.TensorFormat.LINEAR or given.type not in self.words:
            return False
        if position < num_inputs:
            return self.words[given.type] in [_word(d) for d in contract.inputs[position].dtypes]
        by_name = dict(zip(self.input_names, [t.desc.type for t in tensors], strict=False))
        return given.type == self._output_type(contract.outputs[position - num_inputs], by_name)

    def configure_plugin(self, tensors, outputs):
        self._config([t.desc.type for t in tensors], self._sizes([t.max for t in tensors]))

    def get_aliased_input(self, output):
        return self.aliases.get(output, -1)  # TensorRT's word for none

    def get_workspace_size(self, tensors, outputs):
        largest = self._sizes([t.max for t in tensors])
        config = self._config([t.desc.type for t in tensors], largest)
        return self.op.workspace(config, largest, Gpu(self.capability, MAX_SMS))

    def get_valid_tactics(self):
        return [1]

    def set_tactic(self, tactic):
        pass

    def get_fields_to_serialize(self):
        values = [(a.name, a.kind, self.attributes[a.name]) for a in self.op.contract.attributes]
        self._kept = [_field(self.trt, *v) for v in [*values, (CAPABILITY, int, self.capability)]]
        return self.trt.PluginFieldCollection(self._kept)  # which does not keep the memory of its fields alive

    def attach_to_context(self, context):
        return self.clone()

    def on_shape_change(self, tensors, outputs):
        if self.launcher is None:
            return
        if self._axes is None:
            self._axes = _dynamic_axes(self.op.contract, [len(t.dims) for t in tensors])
        changing = tuple([tensors[i].dims[axis] for i, axis in self._axes])
        self._ready = self._plans.get(changing)
        if self._ready is None:
            if len(self._plans) >= _SHAPES:
                self._plans.clear()
            self._ready = self._plans[changing] = self._made_ready(tensors)

    def enqueue(self, tensors, outputs, addresses, output_addresses, workspace, stream):
        if self.launcher is None:
            return  # full TensorRT's builder times layers on arbitrary bytes: lengths and page numbers would be wild
        if self._ready is None:  # TensorRT calls on_shape_change first
            self.on_shape_change(tensors, outputs)
        self._ready([*addresses, *output_addresses], workspace, stream)

    def _made_ready(self, tensors: Sequence) -> Callable:
        """What launches the plan of these shapes, with all kernels loaded that this op may need in any shape."""
        shapes, types, target = tuple([tuple(t.dims) for t in tensors]), [t.type for t in tensors], self.launcher.target
        key = (*self.attributes.items(), *[self.words[t] for t in types], shapes, target)
        plan = self.settled.get(key)
        if plan is None:
            named = self._sizes(shapes)
            config = self._config(types, named)
            self.launcher.prepare(self.op.kernels(config, target))
            if len(self.settled) >= _SETTLED:
                self.settled.clear()
            plan = self.op.plan(config, named, Gpu(target.capability, min(target.num_sms, MAX_SMS)))
            self.settled[key] = plan
        return self.launcher.ready(plan, (*self.input_names[: len(shapes)], *(o.name for o in self.op.contract.outputs)))

    def _sizes(self, shapes):
        return sizes(self.op.contract, shapes, self.attributes)

    def _config(self, input_types, named):
        by_name = {n: self.words[t] for n, t in zip(self.input_names, input_types, strict=False)}
        return self.op.configure(self.attributes, named, by_name)

    def _output_type(self, output, input_types):
        return input_types[output.like] if output.like else self.types[_word(output.dtype)]


def _word(dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _field(trt, name: str, kind: type, value):
    if kind is str:
        return trt.PluginField(name, np.frombuffer(value.encode(), np.int8), trt.PluginFieldType.CHAR)
    if kind is int:
        return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
    return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
