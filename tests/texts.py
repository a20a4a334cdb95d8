"""Checkpoint folders with tokenizers of all kinds, and what the build and the runtime make of them."""

import json
import tempfile
from pathlib import Path

from latentrt.export.text import BakedText, bake
from latentrt.runtime.tokenizer import Tokenizer
from tests.conftest import EXAMPLE

MANY = 1 << 20  # a vocab_size that every tokenizer fits


def edit_json(file: Path, **changes) -> Path:
    """Sets fields of a JSON file, new or old; a field set to `...` is taken out."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return file.parent


def baked(folder: Path, eos_token_id=None, vocab_size: int = MANY) -> BakedText:
    return bake(folder, eos_token_id, vocab_size)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The runtime's tokenizer of what a build bakes."""
    text, out = baked(folder), Path(tempfile.mkdtemp(prefix="latentrt-text-"))
    (out / "tokenizer.json").write_text(text.tokenizer)
    for name, template in text.templates.items():
        (out / name).write_text(template)
    return Tokenizer(str(folder), out / "tokenizer.json", text.special_tokens, {name: out / name for name in text.templates})


def save_deepseek_like(folder: Path) -> Path:
    """The example's vocabulary with the pre-tokenizers, and the class in tokenizer_config.json, of DeepSeek-V2's own files."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors

    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    patterns = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Digits(individual_digits=True), bytes_])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((EXAMPLE / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast"}))
    return folder


def save_sentencepiece(folder: Path, model_type: int = 2) -> Path:
    """A tokenizer.model of SentencePiece with a few pieces (2: BPE, 1: unigram), and a tokenizer_config.json; nothing else."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    piece, model = protobuf.ModelProto.SentencePiece, protobuf.ModelProto()
    pieces = [("<unk>", 0, piece.UNKNOWN), ("<s>", 0, piece.CONTROL), ("</s>", 0, piece.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0, piece.BYTE) for byte in range(256)]
    words = ["▁h", "el", "lo", "▁hel", "▁hello", "▁t", "he", "▁the", *"▁abcdefghijklmnopqrstuvwxyz"]
    pieces += [(word, -n, piece.NORMAL) for n, word in enumerate(words)]
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = model_type, True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>",
                     unk_token="<unk>", add_bos_token=True)  # fmt: skip


def save_vocab_and_merges(folder: Path) -> Path:
    """The example's vocabulary as vocab.json and merges.txt."""
    model = json.loads((EXAMPLE / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    config = json.loads((EXAMPLE / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder
