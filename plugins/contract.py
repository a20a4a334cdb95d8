"""What a custom op is, said once: torch schema, fake, ONNX schema and ONNX translation derive from an `OpContract`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add, floordiv, mul
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import onnx.defs

DOMAIN = "latentrt"
VERSION = 1

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
INT32, INT8, UINT8, FLOAT8 = torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn
ACTIVATIONS = (FLOAT32, FLOAT16, BFLOAT16)

_ONNX_TYPES = {
    torch.float32: "tensor(float)",
    torch.float16: "tensor(float16)",
    torch.bfloat16: "tensor(bfloat16)",
    torch.float8_e4m3fn: "tensor(float8e4m3fn)",
    torch.int32: "tensor(int32)",
    torch.int8: "tensor(int8)",
    torch.uint8: "tensor(uint8)",
}
_OPERATORS = {"+": add, "*": mul, "/": floordiv}
_KINDS = {int: ("int", "INT"), float: ("float", "FLOAT"), str: ("str", "STRING")}  # torch's words, ONNX's


class ContractError(ValueError):
    """An op was given a tensor or an attribute that its contract does not allow."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an op. `dims` are names (equal names must have equal sizes), integers, "B + 1" or "2 * N".

    The last one may be a name and "?": the tensor may come without that axis. `packed` names the attribute that says how
    many elements share one of the tensor's own along the last axis; dims count the former.
    """

    name: str
    dims: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False
    packed: str | None = None

    def dims_of(self, rank: int) -> tuple[str, ...]:
        """The dimensions of a tensor with `rank` axes, without "?"; another number of them if it cannot have that rank."""
        *first, last = self.dims
        absent = last.endswith("?") and rank == len(first)
        return (*first,) if absent else (*first, last.removesuffix("?"))

    def elements(self, shape: Sequence[int], attributes: Mapping) -> tuple[int, ...]:
        """A tensor's shape in elements; in the tensor's own where `attributes` lacks the one that packs them."""
        *first, last = shape
        packed = attributes.get(self.packed, 1)
        return (*first, last * packed if packed > 1 else last)


@dataclass(frozen=True)
class OutputSpec:
    """One output: dims are names bound by inputs or integer attributes, or two with "*" or "/" between them; its dtype is input
    `like`'s, or `dtype`."""

    name: str
    dims: tuple[str, ...]
    like: str | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute; `choices` lists the accepted values of an enumerated one. One with a `default` can be left out."""

    name: str
    kind: type
    choices: tuple = ()
    default: int | None = None


@dataclass(frozen=True)
class OpContract:
    """The whole interface of an op: inputs, outputs, attributes, and which output is an input updated in place.

    `check` gets tensors and attributes by name and says what dims and dtypes cannot: a message, or None if all is well.
    """

    name: str
    onnx_type: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    aliases: tuple[tuple[str, str], ...] = ()  # (output, input) pairs that may share memory
    check: Callable[[dict, dict], str | None] = lambda tensors, attributes: None
    collective: bool = False  # it joins ranks: no kernel of ours

    @property
    def torch_name(self) -> str:
        return f"{DOMAIN}::{self.name}"

    def torch_schema(self, mutating: bool = False) -> str:
        """Schema of the functional op, or of its mutating twin: aliased inputs are written, their outputs dropped."""
        written = {i for _, i in self.aliases} if mutating else set()
        tensors = [_torch_tensor(s, s.name in written) for s in self.inputs]
        defaults = {a.name: "" if a.default is None else f"={a.default}" for a in self.attributes}
        attributes = [f"{_KINDS[a.kind][0]} {a.name}{defaults[a.name]}" for a in self.attributes]
        count = len(self.outputs) - len(written)
        result = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        return f"({', '.join(tensors + attributes)}) -> {result}"

    def onnx_schema(self) -> "onnx.defs.OpSchema":
        """ONNX schema in domain `latentrt`; every tensor has a type variable of its own, dtypes are checked by `bind`."""
        import onnx.defs

        schema = onnx.defs.OpSchema
        option = schema.FormalParameterOption
        inputs = [
            schema.FormalParameter(s.name, f"T_{s.name}", param_option=option.Optional if s.optional else option.Single)
            for s in self.inputs
        ]
        outputs = [schema.FormalParameter(o.name, f"T_{o.like}" if o.like else f"T_{o.name}") for o in self.outputs]
        constraints = [(f"T_{s.name}", [_ONNX_TYPES[d] for d in s.dtypes], "") for s in self.inputs]
        constraints += [(f"T_{o.name}", [_ONNX_TYPES[o.dtype]], "") for o in self.outputs if o.dtype]
        kinds = {a.name: getattr(schema.AttrType, _KINDS[a.kind][1]) for a in self.attributes}
        attributes = [schema.Attribute(a.name, kinds[a.name], required=a.default is None) for a in self.attributes]
        return schema(
            self.onnx_type, DOMAIN, VERSION, inputs=inputs, outputs=outputs, type_constraints=constraints,
            attributes=attributes,
        )  # fmt: skip

    def bind(self, tensors: Sequence[torch.Tensor | None], attributes: dict) -> dict[str, int]:
        """Checks ranks, sizes, dtypes and enumerated attributes; returns the size of every named dimension.

        Raises ContractError naming the op, the tensor or attribute, what was found and what is accepted.
        """
        sizes: dict[str, int] = {}
        attributes = self.with_defaults(attributes)
        by_name = {s.name: t for s, t in zip(self.inputs, tensors, strict=True)}
        for spec in self.attributes:
            if spec.choices and attributes[spec.name] not in spec.choices:
                raise ContractError(
                    f"{self.name}: {spec.name} is {attributes[spec.name]!r}, accepted: {', '.join(map(repr, spec.choices))}"
                )
        for bind in (self._bind_names, self._check_sums):
            for spec in self.inputs:
                if by_name[spec.name] is not None:
                    bind(spec, by_name[spec.name], spec.elements(by_name[spec.name].shape, attributes), sizes)
                elif not spec.optional:
                    raise ContractError(f"{self.name}: input {spec.name} is required")
        if message := self.check(by_name, attributes):
            raise ContractError(f"{self.name}: {message}")
        return sizes

    def with_defaults(self, attributes: dict) -> dict:
        """`attributes` by name, and the default of every one that is left out."""
        return {a.name: attributes.get(a.name, a.default) for a in self.attributes}

    def _bind_names(self, spec: TensorSpec, tensor: torch.Tensor, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        if tensor.dtype not in spec.dtypes:
            accepted = ", ".join(map(str, spec.dtypes))
            raise ContractError(f"{self.name}: {spec.name} has dtype {tensor.dtype}, accepted: {accepted}")
        dims = spec.dims_of(tensor.dim())
        if tensor.dim() != len(dims):
            raise ContractError(f"{self.name}: {spec.name} has shape {tuple(tensor.shape)}, expected {list(spec.dims)}")
        for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if dim.isidentifier() and sizes.setdefault(dim, size) != size:
                raise self._wrong_size(spec, tensor, axis, sizes[dim])

    def _check_sums(self, spec: TensorSpec, tensor: torch.Tensor, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        for axis, (dim, size) in enumerate(zip(spec.dims_of(tensor.dim()), shape, strict=True)):
            if not dim.isidentifier() and _size_of(dim, sizes) != size:
                raise self._wrong_size(spec, tensor, axis, _size_of(dim, sizes))

    def _wrong_size(self, spec: TensorSpec, tensor: torch.Tensor, axis: int, expected: int) -> ContractError:
        dim, shape = spec.dims[axis], tuple(tensor.shape)
        return ContractError(f"{self.name}: {spec.name} has shape {shape}; axis {axis} ({dim}) must be {expected}")

    def fake(self, tensors: Sequence[torch.Tensor | None], attributes: dict) -> list[torch.Tensor]:
        """Empty outputs of the right shape, dtype and device, for tracing."""
        sizes = self.bind(tensors, attributes) | {k: v for k, v in attributes.items() if isinstance(v, int)}
        by_name = {s.name: t for s, t in zip(self.inputs, tensors, strict=True)}
        device = tensors[0].device
        return [
            torch.empty([_size_of(d, sizes) for d in o.dims], dtype=by_name[o.like].dtype if o.like else o.dtype, device=device)
            for o in self.outputs
        ]


def _torch_tensor(spec: TensorSpec, written: bool) -> str:
    if written:
        return f"Tensor(a!) {spec.name}"
    return f"Tensor{'?' if spec.optional else ''} {spec.name}"


def terms(dim: str) -> tuple[str, str, str]:
    """The parts of a dimension: a name or an integer, "+", "*" or "/", another one; of a single one the last two are empty."""
    left, operator, right = (*dim.split(" "), "", "")[:3]
    return left, operator, right


def _size_of(dim: str, sizes: dict[str, int]) -> int:
    """Size of a dimension: a name, an integer, or two of them with "+", "*" or "/" between them."""
    left, operator, right = terms(dim)
    found = [int(part) if part.isdigit() else sizes[part] for part in (left, right) if part]
    return _OPERATORS[operator](*found) if operator else found[0]


def register(contract: OpContract, compute: Callable) -> None:
    """Registers the functional torch op, its mutating twin where outputs alias inputs, and the ONNX schema.

    `compute(*tensors, **attributes)` returns a tuple of outputs and never writes its inputs.
    """
    split = len(contract.inputs)
    names = [a.name for a in contract.attributes]

    def functional(*args):
        tensors, attributes = args[:split], contract.with_defaults(dict(zip(names, args[split:], strict=False)))
        contract.bind(tensors, attributes)
        outputs = compute(*tensors, **attributes)
        return outputs if len(outputs) > 1 else outputs[0]

    def fake(*args):
        outputs = contract.fake(args[:split], contract.with_defaults(dict(zip(names, args[split:], strict=False))))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    op = torch.library.custom_op(contract.torch_name, functional, mutates_args=(), schema=contract.torch_schema())
    op.register_fake(fake)
    if contract.aliases:
        _register_mutating(contract, functional, fake)
    _register_onnx(contract)


def _register_onnx(contract: OpContract) -> None:
    """Nothing where onnx is not installed: kernels and their launches need no graph."""
    try:
        import onnx.defs
    except ModuleNotFoundError:
        return
    if not onnx.defs.has(contract.onnx_type, DOMAIN):
        onnx.defs.register_schema(contract.onnx_schema())


def _register_mutating(contract: OpContract, functional: Callable, fake: Callable) -> None:
    """`<name>_`: the same computation, with every aliased output copied into its input instead of returned."""
    targets = {o: [s.name for s in contract.inputs].index(i) for o, i in contract.aliases}
    kept = [k for k, o in enumerate(contract.outputs) if o.name not in targets]

    def pick(outputs):
        return outputs[kept[0]] if len(kept) == 1 else tuple(outputs[k] for k in kept)

    def mutating(*args):
        outputs = functional(*args)
        for spec, output in zip(contract.outputs, outputs, strict=True):
            if spec.name in targets:
                args[targets[spec.name]].copy_(output)
        return pick(outputs)

    written = tuple(i for _, i in contract.aliases)
    twin = torch.library.custom_op(
        f"{contract.torch_name}_", mutating, mutates_args=written, schema=contract.torch_schema(mutating=True)
    )
    twin.register_fake(lambda *args: pick(fake(*args)))


def onnx_translation(contract: OpContract) -> Callable:
    """The function that `torch.onnx.export` calls (custom_translation_table) to emit this op's node."""
    import onnxscript

    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    split = len(contract.inputs)
    names = [s.name for s in contract.inputs] + [a.name for a in contract.attributes]

    def translate(*args, **kwargs):
        values = dict(zip(names, args, strict=False)) | kwargs
        attributes = contract.with_defaults(values)
        return getattr(opset, contract.onnx_type)(*[values[n] for n in names[:split]], **attributes)

    absent = {a.name: a.default for a in contract.attributes if a.default is not None}
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [inspect.Parameter(n, kind, default=absent.get(n, empty)) for n in names]
    translate.__signature__ = inspect.Signature(parameters)
    translate.__annotations__ = {a.name: a.kind for a in contract.attributes}
    translate.__name__ = contract.name
    return translate
