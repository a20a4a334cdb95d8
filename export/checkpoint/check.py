"""Does a checkpoint fit its config.json? All findings at once, and what explains many of them first."""

from typing import TYPE_CHECKING

from latentrt.export.models import registry

if TYPE_CHECKING:
    from latentrt.export.checkpoint.reader import Checkpoint

DTYPES = ("F64", "F32", "F16", "BF16")  # of tensors that are stored as they are
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def findings(checkpoint: "Checkpoint") -> list[str]:
    """Lines about missing and misshapen tensors and types that are not read; causes first, nothing if all is well."""
    expected, tensors = checkpoint.expected_tensors(), checkpoint.tensors
    missing = [name for name in expected if name not in tensors]
    found = [f"missing tensor {name}, expected shape {list(expected[name])}" for name in missing]
    for name, source in tensors.items():
        dtype = checkpoint.plain_types.get(name)
        if source.shape != tuple(expected[name]):
            wrong = f"shape {list(source.shape)}, expected {list(expected[name])}"
        elif dtype not in (None, *DTYPES):
            wrong = f"dtype {dtype} and no scale, accepted: {', '.join(DTYPES)}"
        else:
            continue
        found.append(f"{checkpoint.file(source).name}: tensor {name} has {wrong}")
    return _causes(checkpoint, missing) + found if found else []


def _causes(checkpoint: "Checkpoint", missing: list[str]) -> list[str]:
    """A size that the tensors contradict, layers that are not there, a tied head."""
    config, tensors, causes = checkpoint.config, checkpoint.tensors, []
    for field, (name, axis) in registry.of(config).sizes(config).items():
        source, said = tensors.get(name), getattr(config, field)
        if source and axis < len(source.shape) and source.shape[axis] != said:
            found = source.shape[axis]
            causes.append(
                f"config.json says {field} {said}, the tensors have {found} ({name} is {list(source.shape)}): "
                f"set {field} to {found}, or take the config.json that belongs to these tensors"
            )
    present = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    absent = [layer for layer in range(config.num_hidden_layers) if layer not in present]
    if absent:
        some = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        causes.append(
            f"{len(absent)} of {config.num_hidden_layers} layers (num_hidden_layers) have no tensor: {some}; "
            "shards are missing, or the config.json belongs to another checkpoint"
        )
    if HEAD in missing and EMBEDDING in tensors:
        causes.append(f"{HEAD} is missing: where the head is the embedding, set tie_word_embeddings to true in config.json")
    return causes
