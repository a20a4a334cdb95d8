"""Static scales of FP8 activations: one constant per linear, from the largest |input| over sample tokens.

The torch model runs over the checkpoint in float32, layer by layer: one layer's weights are loaded, all sample tokens go
through it, and only their hidden states stay. What is scaled is what `fp8_graph` quantizes of linears; the experts inside
moe_experts keep one scale per token whatever was calibrated. Values beyond the largest one seen saturate at run time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.config import DeepseekV2Config
from export.errors import BuildError
from export.models import deepseek_v2
from export.models.weights import Weight
from export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX

TEXT_SEQUENCE = 512  # tokens of one sequence that a text is cut into
_PAGE, _CHUNK = 64, 256  # the cache's page; rows at once, which bounds the attention scores [rows, heads, tokens]
_WIDE = 1024  # hidden_size from which threads help; at 192, two were 7 to 20 times slower than one on two shared cores


@dataclass(frozen=True)
class Samples:
    """Token ids of sequences, at least one and none empty."""

    sequences: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        """Identifies the tokens, whatever file they came from."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()


def read_samples(file: Path | str, checkpoint: Checkpoint) -> Samples:
    """Sample tokens: a JSON list of lists of token ids, or UTF-8 text for the checkpoint's tokenizer.json.

    A file that begins with [ or { is taken for JSON. Text is cut into sequences of TEXT_SEQUENCE tokens. Raises BuildError
    for what cannot be read, ids outside the vocabulary, and sequences longer than max_position_embeddings.
    """
    file, longest = Path(file), checkpoint.config.max_position_embeddings
    text = _text(file)
    if text.lstrip()[0] in "[{":
        sequences = _token_lists(file, text)
    else:
        ids, length = _encode(file, text, checkpoint.path / "tokenizer.json"), min(TEXT_SEQUENCE, longest)
        sequences = [ids[i : i + length] for i in range(0, len(ids), length)]
    for number, sequence in enumerate(sequences):
        _check(f"calibration {file}: sequence {number}", sequence, checkpoint.config)
    return Samples(tuple(map(tuple, sequences)))


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BuildError(f"calibration {file}: cannot be read ({error.strerror}); give a file of sample tokens") from None
    except UnicodeDecodeError as error:
        raise BuildError(f"calibration {file}: not UTF-8 ({error}); accepted: text, or a JSON list of id lists") from None
    if not text.strip():
        raise BuildError(f"calibration {file}: is empty; give text, or a JSON list of lists of token ids")
    return text


def _token_lists(file: Path, text: str) -> list[list[int]]:
    expected = "expected a list of lists of token ids such as [[1, 2, 3], [4]] (text must not begin with [ or {)"
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BuildError(f"calibration {file}: begins like JSON, but is none ({error}); {expected}") from None
    if not isinstance(found, list) or not found:
        raise BuildError(f"calibration {file}: holds {str(found)[:40]!r}, {expected}")
    for number, sequence in enumerate(found):
        if not isinstance(sequence, list) or not sequence or any(type(i) is not int for i in sequence):
            raise BuildError(f"calibration {file}: sequence {number} is {str(sequence)[:40]!r}, {expected}")
    return found


def _encode(file: Path, text: str, tokenizer: Path) -> list[int]:
    from tokenizers import Tokenizer

    if not tokenizer.is_file():
        raise BuildError(
            f"calibration {file}: is text, and the checkpoint has no {tokenizer.name} ({tokenizer.parent}); add it, or give "
            "a JSON list of lists of token ids"
        )
    try:
        return Tokenizer.from_file(str(tokenizer)).encode(text).ids
    except Exception as error:  # the Rust library raises nothing narrower
        raise BuildError(f"{tokenizer}: cannot encode calibration {file} ({error}); download it again") from None


def _check(where: str, sequence: list[int], config: DeepseekV2Config) -> None:
    stranger = next((i for i in sequence if not 0 <= i < config.vocab_size), None)
    if stranger is not None:
        raise BuildError(f"{where} has token id {stranger}, accepted: 0 to {config.vocab_size - 1}; is it another model's?")
    if len(sequence) > config.max_position_embeddings:
        longest = f"accepted: 1 to {config.max_position_embeddings} (max_position_embeddings)"
        raise BuildError(f"{where} has {len(sequence)} tokens, {longest}; cut it")


def activation_scales(
    checkpoint: Checkpoint, samples: Samples, progress: Callable[[float], None] = lambda layers: None
) -> dict[str, float]:
    """Weight name of every linear -> scale of its input: largest |x| / 448. `progress` gets 1 per finished layer."""
    config, scales = checkpoint.config, {}
    members: dict[int, list[Weight]] = {i: [] for i in range(config.num_hidden_layers)}
    for weight in deepseek_v2.weights(config):
        if weight.name.startswith("model.layers."):
            members[int(weight.name.split(".")[2])].append(weight)
    with torch.no_grad(), _threads_for(config):
        states = _embed(checkpoint, samples)
        for number, weights in members.items():
            layer = _load_layer(config, number, weights, checkpoint.read)
            with _largest_inputs(layer, f"model.layers.{number}.", weights) as largest:
                states = [(_run(layer, hidden, cos, sin, config), cos, sin) for hidden, cos, sin in states]
            del layer  # before the next one is loaded
            checkpoint.release()
            scales |= {name: max(value, SMALLEST_ABSMAX) / LARGEST for name, value in largest.items()}
            progress(1)
    return scales


@contextmanager
def _threads_for(config: DeepseekV2Config) -> Iterator[None]:
    """One thread where products are so small that several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.hidden_size < _WIDE else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _embed(checkpoint: Checkpoint, samples: Samples) -> list[tuple[Tensor, Tensor, Tensor]]:
    """hidden [T, hidden_size], cos and sin [T, qk_rope_head_dim / 2] of every sequence, float32."""
    module = deepseek_v2.Embed(checkpoint.config.model_copy(update={"vocab_size": 1}))  # the table comes from the checkpoint
    module.embed_tokens.weight = nn.Parameter(checkpoint.read("model.embed_tokens.weight"), requires_grad=False)
    found = [module(torch.tensor(s), torch.arange(len(s))) for s in samples.sequences]
    return [(hidden.float(), cos, sin) for hidden, cos, sin in found]


def _load_layer(config: DeepseekV2Config, number: int, weights: list[Weight], read) -> deepseek_v2.DecoderLayer:
    """The layer in float32, filled slab by slab: memory holds the layer and one tensor of the checkpoint."""
    with torch.device("meta"):
        layer = deepseek_v2.DecoderLayer(config, config.is_moe_layer(number), "float32")
    layer.to_empty(device="cpu")
    parameters = dict(layer.named_parameters())
    for weight in weights:
        parameter, start = parameters.pop(weight.name.removeprefix(f"model.layers.{number}.")), 0
        for slab in weight.slabs(read):
            parameter[start : start + len(slab)].copy_(slab)
            start += len(slab)
        assert start == len(parameter), weight.name
    assert not parameters, f"no weight for {sorted(parameters)}"
    return layer


@contextmanager
def _largest_inputs(layer: nn.Module, prefix: str, weights: list[Weight]) -> Iterator[dict[str, float]]:
    """Weight name of every linear of the layer -> largest |input| so far, while the context lasts."""
    largest = {w.name: 0.0 for w in weights if w.role == "linear"}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        return hook

    linears = {n: layer.get_submodule(n.removeprefix(prefix).removesuffix(".weight")) for n in largest}
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _run(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, config: DeepseekV2Config) -> Tensor:
    """One whole sequence through the layer, [T, hidden_size] -> the same, in chunks over a cache of its own."""
    pages, width = -(-len(hidden) // _PAGE), config.kv_lora_rank + config.qk_rope_head_dim
    cache, table, parts = torch.zeros(pages, _PAGE, width), torch.arange(pages, dtype=torch.int32)[None], []
    for start in range(0, len(hidden), _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(hidden)))
        count = rows.stop - start
        batch = (torch.tensor(v, dtype=torch.int32) for v in ([start], [0, count], [count]))
        part, cache = layer(hidden[rows], cos[rows], sin[rows], cache, table, *batch)
        parts.append(part)
    return torch.cat(parts)
