"""Writing the checkpoint, judging it on held-out text, and the record of both: training.json and the README."""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM

from examples.training.config import BOS, CONFIG, EOS
from examples.training.model import RouterWatch
from examples.training.tokenizer import tokenizer_config
from examples.training.trainer import SHORT

JUDGED_WINDOW = 512
README = """# tiny-deepseek-v2

A small DeepSeek-V2 checkpoint that was really trained, for the examples and tests of latentrt. It has every part of
the architecture: compressed queries and latent attention, a dense first layer, group-limited routing over
{n_routed_experts} experts with {n_shared_experts} shared ones, and YaRN from {original} to {longest} positions.
Expect lines that look like Python and short answers in the right format, not true ones.

Loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, without remote code.

| | |
|---|---|
| parameters | {parameters:,} ({layers} layers, hidden size {hidden_size}, bf16) |
| tokens seen | {tokens_seen:,} in {steps:,} steps ({training_tokens_in_corpus:,} in the corpus) |
| of which | {lengths} |
| training time | {training_seconds:,} s, {tokens_per_second:,} tokens/s on a machine shared with other work |
| schedules | {schedules} (each after the first resumes the one before, with a higher learning rate) |
| machine, date | {machine}; {date} |
| command | `{command}` |
| held-out perplexity per token | **{perplexity_per_token}** (unigram baseline: {unigram_perplexity_per_token}) |
| held-out bits per byte | **{bits_per_byte}** |
| perplexity by window length | {windows} |

The perplexities are those of the saved bf16 weights, loaded by transformers and computed in float32, over the
{held_out_tokens:,} tokens of `held_out.txt` in windows of {window} tokens. The unigram baseline counts the training
tokens, plus one each. `training.json` has these numbers and the share of tokens that each expert takes.

## Where the text comes from

The training text is the standard library of Python {python}: its source without tests, the sections of the language
reference in `pydoc_data`, and questions and answers made from docstrings. `held_out.txt` is text of the same kind that
was not trained on: whole files, reference sections and answers about names left out of the training pairs. Documents
stand between the literal begin and end tokens, so encode it with `add_special_tokens=False`.

Python's standard library is Copyright (c) 2001 Python Software Foundation; all rights reserved. It is used and, in
`held_out.txt`, redistributed under the PSF License Version 2 (https://docs.python.org/3/license.html); some files carry
the notices of their own authors. The weights and the tokenizer were made from that text by
`examples/training`.
"""


def write_folder(out: Path, files: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Put text files and weights into `out`, each by renaming a finished temporary, the weights last."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = out / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / name)
    temporary = out / ".model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, out / "model.safetensors")


def static_files(tokenizer: Tokenizer, held_out: str) -> dict[str, str]:
    """Everything in the folder that does not change with training."""
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    as_json = {"config.json": CONFIG, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config()}
    files = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in as_json.items()}
    return {**files, "tokenizer.json": tokenizer.to_str(pretty=False), "held_out.txt": held_out}


@torch.no_grad()
def stream_nll(model: DeepseekV2ForCausalLM, ids: torch.Tensor, window: int) -> float:
    """Summed nats of ids[1:], each predicted once; windows of `window` tokens that share one token at the edge."""
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window + 1].unsqueeze(0)
        logits = model(piece[:, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), piece[0, 1:], reduction="sum").item()
    return total


def unigram_perplexity(documents: list[np.ndarray], ids: torch.Tensor) -> float:
    """Perplexity of ids[1:] under token counts of the training documents, one added to each."""
    counts = np.bincount(np.concatenate(documents), minlength=CONFIG["vocab_size"]) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[ids[1:].numpy()].mean()))


def judge(out: Path, documents: list[np.ndarray]) -> dict:
    """Measure the saved checkpoint, loaded back through transformers in float32, on its held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    text = (out / "held_out.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    plain_bytes = len(text.replace(BOS, "").replace(EOS, "").encode())
    watch = RouterWatch(model)
    nll = stream_nll(model, ids, JUDGED_WINDOW)
    usage = watch.usage()
    return {
        "held_out_tokens": len(ids) - 1,
        "held_out_bytes": plain_bytes,
        "perplexity_per_token": round(math.exp(nll / (len(ids) - 1)), 3),
        "bits_per_byte": round(nll / math.log(2) / plain_bytes, 4),
        "perplexity_by_window": {
            w: round(math.exp(stream_nll(model, ids, w) / (len(ids) - 1)), 3) for w in (128, 256, 1024, 2048)
        },
        "unigram_perplexity_per_token": round(unigram_perplexity(documents, ids), 1),
        "expert_usage_by_layer": usage,
        "max_logit_difference_of_training_experts": experts_difference(model, ids[:1024]),
    }


@torch.no_grad()
def experts_difference(model: DeepseekV2ForCausalLM, ids: torch.Tensor) -> float:
    """Largest difference of the logits between transformers' own experts and `all_experts`; at most 1e-4."""
    pieces = ids.view(-1, SHORT)
    model.set_experts_implementation("eager")
    reference = model(pieces, use_cache=False).logits
    model.set_experts_implementation("all_experts")
    difference = (model(pieces, use_cache=False).logits - reference).abs().max().item()
    if difference > 1e-4:
        raise ValueError(f"the training experts differ from transformers' by {difference}, allowed is 1e-4")
    return difference


def write_record(out: Path, record: dict) -> None:
    """training.json and the README that repeats it, by renaming finished temporaries."""
    windows = ", ".join(f"{length}: {value}" for length, value in record["perplexity_by_window"].items())
    names = {
        "original": CONFIG["rope_scaling"]["original_max_position_embeddings"],
        "longest": CONFIG["max_position_embeddings"],
        "layers": CONFIG["num_hidden_layers"],
        "windows": windows,
        "window": JUDGED_WINDOW,
        "lengths": ", ".join(f"{n:,} in windows of {w}" for w, n in record["tokens_by_window_length"].items()),
        "schedules": ", ".join(f"{minutes:g} minutes" for minutes in record["schedules_minutes"]),
    }
    files = {"training.json": json.dumps(record, indent=2) + "\n"}
    files["README.md"] = README.format(**{**CONFIG, **record, **names})
    for name, text in files.items():
        temporary = out / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / name)
