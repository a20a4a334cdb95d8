"""A checkpoint as one GGUF file of llama.cpp's architecture deepseek2, written tensor by tensor.

    python -m benchmarks.gguf_checkpoint CHECKPOINT OUT.gguf --kind Q4_0

The tensors are those of llama.cpp's own convert_hf_to_gguf: kv_b_proj is split into attn_k_b (transposed) and attn_v_b, so that
llama.cpp runs MLA in its absorbed form with one KV head; experts are stacked; norms and the router stay float32. Every other
matrix is of the same kind, embedding and head too, as `llama-quantize --pure` does. A folder's byte-level tokenizer.json is the
vocabulary, which llama.cpp's server needs; without one ids go in and out. Groups of experts are left out: llama.cpp chooses
among all of them.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import torch
import typer
from gguf import GGMLQuantizationType
from torch import Tensor

from benchmarks import make_checkpoint
from latentrt.export.checkpoint.gguf_files import EXPERTS, KEY, LAYER, VALUE, WHOLE
from latentrt.export.models import registry
from latentrt.export.models.base import Config

Read = Callable[[str], Tensor]  # a tensor by its name in the Hugging Face checkpoint
LITE = (26, 27)  # llama.cpp takes a missing q_lora_rank only with these numbers of layers, and q_lora_rank 0 with all others
PLAIN = GGMLQuantizationType.F32


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file: `parts` gives its pieces along the first axis, float32, one after another."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    parts: Callable[[Read], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size

    def octets(self, read: Read) -> np.ndarray:
        """uint8, all of it."""
        made = [gguf.quants.quantize(part.float().numpy(), self.kind).view(np.uint8).reshape(-1) for part in self.parts(read)]
        return made[0] if len(made) == 1 else np.concatenate(made)


def write(config: Config, read: Read, out: Path, kind: str, tokenizer: Path | None = None) -> None:
    """kind: Q4_0, Q8_0, BF16, F16 or F32; tokenizer: a byte-level tokenizer.json."""
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "deepseek2")
    _describe(writer, config, kind)
    if tokenizer:
        _add_vocabulary(writer, config, json.loads(tokenizer.read_text()))
    else:
        writer.add_tokenizer_model("none")
    targets = list(plan(config, GGMLQuantizationType[kind]))
    for t in targets:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, t.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in targets:
        writer.write_tensor_data(t.octets(read))
    writer.close()
    partial.rename(out)


def plan(config: Config, kind: GGMLQuantizationType) -> Iterator[Target]:
    """The GGUF tensors in the order of the checkpoint."""
    shapes = registry.of(config).checkpoint_tensors(config)
    whole = {v: k for k, v in WHOLE.items()}
    layer = {v: k for k, v in LAYER.items()}
    experts = {v: k for k, v in EXPERTS.items()}
    for name, shape in shapes.items():
        number, kept = _layer(name)
        if name in whole:
            yield Target(whole[name], shape, _kind(whole[name], shape, kind), _one(name))
        elif kept == "self_attn.kv_b_proj":
            yield from _kv_b(config, name, f"blk.{number}", kind)
        elif match := re.fullmatch(r"mlp\.experts\.0\.(\w+)", kept):
            names = [name.replace(".experts.0.", f".experts.{e}.") for e in range(config.n_routed_experts)]
            yield Target(f"blk.{number}.{experts[match[1]]}.weight", (len(names), *shape), kind, _all(names))
        elif not kept.startswith("mlp.experts."):
            made = f"blk.{number}.{layer[kept]}.weight"
            yield Target(made, shape, _kind(made, shape, kind), _one(name))


def _layer(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return (match[1], match[2]) if match else ("", name)


def _kind(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    return PLAIN if len(shape) == 1 or "ffn_gate_inp" in name else kind


def _one(name: str) -> Callable[[Read], Iterator[Tensor]]:
    return lambda read: iter([read(name)])


def _all(names: list[str]) -> Callable[[Read], Iterator[Tensor]]:
    return lambda read: map(read, names)


def _kv_b(config: Config, name: str, layer: str, kind: GGMLQuantizationType) -> Iterator[Target]:
    heads, nope, v, rank = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank

    def halves(read: Read) -> tuple[Tensor, Tensor]:
        return read(name).view(heads, nope + v, rank).split([nope, v], 1)

    key = lambda read: iter([halves(read)[0].transpose(1, 2).contiguous()])  # noqa: E731
    value = lambda read: iter([halves(read)[1].contiguous()])  # noqa: E731
    yield Target(f"{layer}.{KEY}.weight", (heads, rank, nope), kind, key)
    yield Target(f"{layer}.{VALUE}.weight", (heads, v, rank), kind, value)


def _describe(writer: gguf.GGUFWriter, config: Config, kind: str) -> None:
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}", gguf.LlamaFileType.ALL_F32))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None or config.num_hidden_layers not in LITE:
        writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    if config.rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope.mscale_all_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, config: Config, tokenizer: dict) -> None:
    """Of a byte-level BPE tokenizer that splits as GPT-2's does."""
    tokens = {number: (f"<unused {number}>", gguf.TokenType.UNUSED) for number in range(config.vocab_size)}
    tokens |= {number: (token, gguf.TokenType.NORMAL) for token, number in tokenizer["model"]["vocab"].items()}
    tokens |= {added["id"]: (added["content"], gguf.TokenType.CONTROL) for added in tokenizer["added_tokens"]}
    texts, types = zip(*(tokens[number] for number in range(config.vocab_size)), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_add_bos_token(False)
    if isinstance(config.eos_token_id, int):
        writer.add_eos_token_id(config.eos_token_id)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]])


def reader_of(folder: Path) -> Read:
    """Tensors of a folder of safetensors files."""
    from safetensors import safe_open

    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        opened = safe_open(file, "pt")
        places |= dict.fromkeys(opened.keys(), opened)
    return lambda name: places[name].get_tensor(name)


def random_reader(config: Config) -> Read:
    """The tensors that benchmarks/make_checkpoint.py would write into one file, without that file."""
    shapes = registry.of(config).checkpoint_tensors(config)
    numbers = {name: number for number, name in enumerate(shapes)}

    def read(name: str) -> Tensor:
        octets = b"".join(make_checkpoint.pieces(name, shapes[name], torch.bfloat16, numbers[name]))
        return torch.frombuffer(bytearray(octets), dtype=torch.bfloat16).view(shapes[name])

    return read


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of config.json and safetensors files.")],
    out: Annotated[Path, typer.Argument(help="GGUF file to write.")],
    kind: Annotated[str, typer.Option(help="Q4_0, Q8_0, BF16, F16 or F32.")] = "Q4_0",
) -> None:
    """Writes the file."""
    config, tokenizer = registry.parse(json.loads((checkpoint / "config.json").read_text())), checkpoint / "tokenizer.json"
    write(config, reader_of(checkpoint), out, kind, tokenizer if tokenizer.exists() else None)


if __name__ == "__main__":
    typer.run(main)
