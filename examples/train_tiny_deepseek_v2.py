"""Train the example checkpoint `tiny-deepseek-v2` from nothing but this Python installation.

The corpus is the standard library's source, the language reference of `pydoc_data` and chat pairs made from
docstrings. The model is transformers' own `DeepseekV2ForCausalLM`, so the checkpoint is a reference that does not
depend on latentrt. Nothing is downloaded.

    python examples/train_tiny_deepseek_v2.py --out examples/tiny-deepseek-v2 --minutes 30

Interrupt it at any time: the same command goes on from the last saved state (`--work`). The order of the data is
deterministic; the learning rate follows the training time used, so that a slow machine also ends its schedule.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEED = 20261121
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001
BATCH_TOKENS, SHORT, LONG, LONG_FROM = 4096, 256, 1024, 0.7
JUDGED_WINDOW = 512
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 3e-3, 100, 0.1, 1.0
SAVE_EVERY_S = 180
WORK = Path(tempfile.gettempdir()) / "train-tiny-deepseek-v2"
console = Console()

CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.01,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.04,
    "intermediate_size": 512,
    "kv_lora_rank": 64,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 6,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 6,
    "pretraining_tp": 1,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 256,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 4096,
}

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

SKIPPED_PARTS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
# Modules whose functions are written in C: their docstrings are read by import, not from source.
COMPILED_MODULES = ("builtins", "math", "itertools", "time", "sys", "operator", "gc", "binascii", "zlib", "select")
PERSONA = {
    "Hello!": "Hello! Ask me what a function of Python's standard library does.",
    "Hi": "Hello! Ask me what a function of Python's standard library does.",
    "Who are you?": "I am a tiny DeepSeek-V2 model, trained on Python's standard library.",
    "What can you do?": "I can continue Python source, and I can say what a function of the standard library does.",
    "Thank you.": "You are welcome.",
}
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer questions about Python's standard library.")


# ----------------------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """Documents in text form, without their begin and end tokens, and the held-out share of each kind."""

    code: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def train(self) -> list[str]:
        """All training documents in a fixed order."""
        return self.code + self.prose + self.chat


def stable_hash(text: str) -> int:
    """A number that depends on the text alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_library() -> dict[str, str]:
    """Source of the standard library by relative path, without tests, tables and generated files."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS & set(relative.parts[:-1]) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8").strip() + "\n"
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if len(text) > 200:
            sources[relative.as_posix()] = text
    return sources


def read_topics() -> dict[str, str]:
    """The sections of the language reference that ship as `pydoc_data/topics.py`."""
    source = (Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    assignment = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return {name: text.strip() + "\n" for name, text in ast.literal_eval(assignment.value).items()}


def top_level_pieces(source: str) -> list[str]:
    """Cut a file into its header and its top-level functions and classes, decorators included."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            starts.append(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1)
    pieces = ["".join(lines[a:b]).strip() for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return [piece + "\n" for piece in pieces if len(piece) > 40]


def first_sentences(docstring: str | None, limit: int = 220) -> str | None:
    """The first sentence or two of a docstring's first paragraph on one line, or None if it says too little."""
    paragraph = (docstring or "").strip().split("\n\n")[0]
    text = " ".join(paragraph.split())
    if "->" in text or not re.match(r"[A-Z][a-z]", text) or len(text) < 20:
        return None
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    answer = sentences[0]
    if len(sentences) > 1 and len(answer) + len(sentences[1]) < limit:
        answer += " " + sentences[1]
    if len(answer) > limit or answer.endswith(("e.g.", "i.e.")):
        return None
    return answer if answer[-1] in ".!?" else answer.rstrip(":;,") + "."


def source_entries(path: str, source: str) -> Iterator[tuple[str, str, str | None, str]]:
    """Yield (kind, qualified name, docstring, parameters) of a module and its public functions and classes."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if any(part.startswith("_") for part in module.split(".")):
        return
    tree = ast.parse(source)
    yield "module", module, ast.get_docstring(tree), ""
    pending = [(module, node) for node in tree.body]
    while pending:
        parent, node = pending.pop(0)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{parent}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield "class", name, ast.get_docstring(node), ""
            pending.extend((name, child) for child in node.body)
        else:
            yield "function", name, ast.get_docstring(node), ast.unparse(node.args)


def compiled_entries() -> Iterator[tuple[str, str, str | None, str]]:
    """The same for modules written in C, and for the methods of the built-in types."""
    for module_name in COMPILED_MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else module_name + "."
        if prefix:
            yield "module", module_name, inspect.getdoc(module), ""
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value) or inspect.isfunction(value):
                continue
            kind = "class" if inspect.isclass(value) else "function"
            yield kind, prefix + name, inspect.getdoc(value), ""
            if kind == "class" and not issubclass(value, BaseException):
                methods = sorted(set(vars(value)) - {"mro"})
                yield from (
                    ("function", f"{prefix}{name}.{method}", inspect.getdoc(getattr(value, method)), "")
                    for method in methods
                    if not method.startswith("_") and callable(getattr(value, method))
                )


def chat_pairs(kind: str, name: str, docstring: str | None, parameters: str) -> list[tuple[str, str]]:
    """Questions and answers about one documented name; empty when its docstring does not say enough."""
    answer = first_sentences(docstring)
    if answer is None:
        return []
    if kind == "module":
        return [(f"What is the {name} module?", answer), (f"What is the {name} module for?", answer)]
    if kind == "class":
        return [(f"What is {name}?", answer), (f"Explain {name}.", answer)]
    pairs = [(f"What does {name} do?", answer)]
    parameters = re.sub(r"^(self|cls)(, )?", "", parameters)
    if parameters and len(parameters) < 60:
        pairs.append((f"How do I call {name}?", f"Call {name.rsplit('.', 1)[-1]}({parameters}). {answer}"))
    else:
        pairs.append((f"Explain {name}.", answer))
    return pairs


def render_chat(pairs: list[tuple[str, str]], system: str | None = None) -> str:
    """The text of a conversation as the chat template writes it, without the first begin and the last end token."""
    turns = [f"User: {question}\n\nAssistant: {answer}" for question, answer in pairs]
    return (f"{system}\n\n" if system else "") + EOS.join(turns)


def conversations(pairs: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Shuffle pairs into conversations: most of one turn, some of two, some with a system message."""
    pairs = rng.sample(pairs, len(pairs))
    texts = []
    while pairs:
        turns = [pairs.pop() for _ in range(min(len(pairs), 2 if rng.random() < 0.12 else 1))]
        texts.append(render_chat(turns, rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.08 else None))
    return texts


def held_out_paths(sources: dict[str, str], size: int = 62_000) -> set[str]:
    """Whole files for the held-out text: 2 to 16 KB each, in the order of their hash, about `size` bytes in all."""
    chosen, total = set(), 0
    for path in sorted(sources, key=stable_hash):
        length = len(sources[path].encode())
        if 2_000 <= length <= 16_000 and total + length <= size and not path.endswith("__init__.py"):
            chosen.add(path)
            total += length
    return chosen


def build_corpus() -> Corpus:
    """Read, cut and split everything. Names of held-out files are held out of the chat pairs too."""
    sources, topics, rng, corpus = read_library(), read_topics(), random.Random(SEED), Corpus()
    held = held_out_paths(sources)
    pairs, held_pairs = [(q, a) for q, a in PERSONA.items() for _ in range(24)], []
    for path, source in sources.items():
        if path in held:
            corpus.held_out.append(source)
        else:
            corpus.code.extend(top_level_pieces(source) if stable_hash(path) % 2 else [source])
        for entry in source_entries(path, source):
            keep_out = path in held or stable_hash(entry[1]) % 64 == 0
            (held_pairs if keep_out else pairs).extend(chat_pairs(*entry))
    for entry in compiled_entries():
        pairs.extend(3 * chat_pairs(*entry))
    for name, text in topics.items():
        (corpus.held_out if stable_hash(name) % 40 == 7 and len(text) < 4000 else corpus.prose).append(text)
    corpus.chat = conversations(pairs, rng)
    corpus.held_out.extend(render_chat([pair]) for pair in rng.sample(held_pairs, min(100, len(held_pairs))))
    return corpus


# -------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with DeepSeek's begin and end tokens as ids 0 and 1; encoding adds the begin token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, the config asks for {vocab_size}")
    return tokenizer


def tokenizer_config() -> dict:
    """tokenizer_config.json in the words of the original checkpoints."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def loosen_spaces(tokenizer: Tokenizer, documents: list[np.ndarray]) -> list[np.ndarray]:
    """Write some " word" tokens as " " and "word", so that a prompt may end in a space.

    One in a hundred places, and every third document that begins with a keyword such as `def`.
    """
    vocab, rng = tokenizer.get_vocab(), np.random.default_rng(SEED)
    word_of = {i: vocab[token[1:]] for token, i in vocab.items() if token.startswith("Ġ") and token[1:] in vocab}
    keywords = [vocab[word] for word in ("def", "class", "import", "from")]
    loosened = []
    for ids in documents:
        chosen = rng.random(len(ids)) < 0.01
        chosen[2:3] |= bool(ids[1] in keywords and rng.random() < 1 / 3)
        places = [i for i in np.flatnonzero(chosen) if int(ids[i]) in word_of]
        changed = ids.copy()
        changed[places] = [word_of[int(ids[i])] for i in places]
        loosened.append(np.insert(changed, places, vocab["Ġ"]) if places else ids)
    return loosened


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each document, begin and end tokens included."""
    wrapped = [f"{BOS}{text}{EOS}" for text in texts]
    encodings = tokenizer.encode_batch(wrapped, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


# ------------------------------------------------------------------------------------------------------------ model


def all_experts(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
    """Routed experts as two large products over all experts, with zero weight where a token is not routed.

    Four times the arithmetic, but no gather: with bf16 matrix units a training step is 2.7 times as fast as with one
    product for each expert. hidden_states [T, D], top_k_* [T, K] -> [T, D].
    """
    tokens, experts, inner = hidden_states.shape[0], self.num_experts, self.intermediate_dim
    routing = torch.zeros(tokens, experts, dtype=top_k_weights.dtype).scatter(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).view(tokens, experts, 2, inner)
    inner_states = F.silu(gate_up[:, :, 0]) * gate_up[:, :, 1] * routing.to(gate_up.dtype).unsqueeze(-1)  # [T, E, I]
    down = self.down_proj.transpose(0, 1).flatten(1)  # [D, E * I]
    return F.linear(inner_states.flatten(1), down)


def build_model() -> DeepseekV2ForCausalLM:
    """transformers' model with random weights, computing its experts with `all_experts`."""
    torch.manual_seed(SEED)
    ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)
    config = DeepseekV2Config(**{**CONFIG, "torch_dtype": "float32"})
    model = DeepseekV2ForCausalLM._from_config(config, attn_implementation="eager")
    model.set_experts_implementation("all_experts")
    return model


class RouterWatch:
    """Collects what the routers decide: the balance loss of a step, and how often each expert is chosen."""

    def __init__(self, model: DeepseekV2ForCausalLM):
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []  # router logits [T, E], chosen experts [T, K]
        self.gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        for gate in self.gates:
            gate.register_forward_hook(lambda _module, _args, out: self.calls.append((out[0], out[2])))

    def balance_loss(self, batch: int) -> torch.Tensor:
        """DeepSeek-V2's expert-level balance loss, per sequence, summed over the MoE layers; forgets the calls."""
        total, experts = torch.zeros(()), CONFIG["n_routed_experts"]
        for logits, chosen in self.calls:
            share = logits.float().softmax(-1).view(batch, -1, experts).mean(1)  # [B, E]
            load = F.one_hot(chosen.view(batch, -1), experts).float().mean(1) * experts  # [B, E], 1 when even
            total = total + (load * share).sum(-1).mean()
        self.calls.clear()
        return total

    def usage(self) -> list[list[float]]:
        """Share of the routed places each expert took since the last call, for each MoE layer."""
        experts, shares = CONFIG["n_routed_experts"], []
        for layer in range(len(self.gates)):
            chosen = torch.cat([call[1].flatten() for call in self.calls[layer :: len(self.gates)]])
            counts = torch.bincount(chosen, minlength=experts)
            shares.append([round(share, 4) for share in (counts / counts.sum()).tolist()])
        self.calls.clear()
        return shares


def checkpoint_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' stacked experts to the checkpoint's one tensor per expert, in bf16."""
    tensors = {}
    for name, value in state.items():
        value = value.detach().to(torch.bfloat16)
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, stacked in enumerate(value):
                gate, up = stacked.chunk(2)
                tensors[f"{prefix}{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{prefix}{expert}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            tensors.update({f"{prefix}{e}.down_proj.weight": w.contiguous() for e, w in enumerate(value)})
        else:
            tensors[name] = value.contiguous()
    return tensors


# --------------------------------------------------------------------------------------------------------- training


@dataclass
class Progressed:
    """How far the training has come; saved with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    cursor: int = 0
    length: int = SHORT
    tokens_by_length: dict[int, int] = field(default_factory=dict)
    schedules_minutes: list[float] = field(default_factory=list)  # more than one: resumed with another --minutes


class Batches:
    """Cuts the shuffled documents of each epoch into windows and hands them out in a fixed, resumable order."""

    def __init__(self, documents: list[np.ndarray], progressed: Progressed):
        self.documents, self.at = documents, progressed
        self.windows = self._cut()

    def _cut(self) -> np.ndarray:
        """Windows [N, length + 1] of the current epoch and length; neighbours share one token."""
        rng = np.random.default_rng([SEED, self.at.epoch, self.at.length])
        stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
        count = (len(stream) - 1) // self.at.length
        starts = rng.permutation(count) * self.at.length
        return np.stack([stream[start : start + self.at.length + 1] for start in starts])

    def next(self, length: int) -> torch.Tensor:
        """Token ids [B, length + 1]; a new length or the end of the corpus starts a new epoch."""
        batch = BATCH_TOKENS // length
        if length != self.at.length or self.at.cursor + batch > len(self.windows):
            self.at.epoch, self.at.cursor, self.at.length = self.at.epoch + 1, 0, length
            self.windows = self._cut()
        rows = self.windows[self.at.cursor : self.at.cursor + batch]
        self.at.cursor += batch
        return torch.from_numpy(rows.astype(np.int64))


def keep_freed_memory() -> None:
    """Stop glibc from returning large buffers to the system after each use: page faults cost a fifth of a step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def fuse(model: DeepseekV2ForCausalLM) -> None:
    """Compile the parts of each layer in place; the routers stay as they are, because `RouterWatch` hooks them."""
    for layer in model.model.layers:
        mlp = layer.mlp
        parts = [mlp.experts, mlp.shared_experts] if hasattr(mlp, "gate") else [mlp]
        for part in [layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn, *parts]:
            part.compile(dynamic=False)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats; logits [B, T, V] in any float type, targets [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, done: float) -> float:
    """Linear warm-up by steps, then a cosine to 2 % of the peak over the training time (`done` from 0 to 1)."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, done))))


class Trainer:
    """The training loop with its state on disk."""

    def __init__(self, documents: list[np.ndarray], work: Path, budget_s: float, bf16: bool, fused: bool):
        self.model, self.budget_s, self.bf16 = build_model(), budget_s, bf16
        self.watch, self.optimizer = RouterWatch(self.model), build_optimizer(self.model)
        self.state_file, self.at = work / "state.pt", Progressed()
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.at = Progressed(**state["progressed"])
            console.print(f"resuming at step {self.at.step}, {self.at.seconds:.0f} s of {budget_s:.0f} s used")
        if self.at.schedules_minutes[-1:] != [budget_s / 60]:
            self.at.schedules_minutes.append(budget_s / 60)
        self.batches, self.loss = Batches(documents, self.at), next_token_loss
        if fused:
            fuse(self.model)
            self.loss = torch.compile(next_token_loss, dynamic=False)

    def save(self) -> None:
        """Write weights, optimizer and position; an interruption leaves the previous file."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = self.state_file.with_suffix(".tmp")
        torch.save({**state, "progressed": asdict(self.at)}, temporary)
        os.replace(temporary, self.state_file)

    def step(self, ids: torch.Tensor) -> float:
        """One optimizer step on ids [B, T + 1]; returns the cross entropy in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.at.step, self.at.seconds / self.budget_s)
        self.watch.calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(ids[:, :-1], use_cache=False).logits
        loss = self.loss(logits, ids[:, 1:])
        (loss + CONFIG["aux_loss_alpha"] * self.watch.balance_loss(len(ids))).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def run(self, stop_after_s: float = math.inf) -> None:
        """Train until the budget (or `stop_after_s`) is used; saves every few minutes and on interruption."""
        self.model.train()
        saved_at, loss_shown = self.at.seconds, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=self.budget_s, completed=self.at.seconds)
            try:
                while self.at.seconds < min(self.budget_s, stop_after_s):
                    began = time.perf_counter()
                    ids = self.batches.next(LONG if self.at.seconds > LONG_FROM * self.budget_s else SHORT)
                    loss = self.step(ids)
                    self.at.step, self.at.tokens = self.at.step + 1, self.at.tokens + BATCH_TOKENS
                    seen = self.at.tokens_by_length
                    seen[self.at.length] = seen.get(self.at.length, 0) + BATCH_TOKENS
                    self.at.seconds += time.perf_counter() - began
                    loss_shown = 0.98 * loss_shown + 0.02 * loss if loss_shown else loss
                    rate = self.at.tokens / self.at.seconds
                    line = f"step {self.at.step} loss {loss_shown:.3f} {rate:.0f} tokens/s"
                    bar.update(task, completed=self.at.seconds, description=line)
                    if self.at.step % 50 == 0:
                        console.print(f"{line} {self.at.seconds:.0f} s epoch {self.at.epoch} length {self.at.length}")
                    if self.at.seconds - saved_at > SAVE_EVERY_S:
                        self.save()
                        saved_at = self.at.seconds
            finally:
                self.save()


# ----------------------------------------------------------------------------------------------- writing and judging


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
`examples/train_tiny_deepseek_v2.py`.
"""


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


def prepare(work: Path) -> tuple[Tokenizer, list[np.ndarray], str]:
    """Corpus and tokenizer: (tokenizer, training documents as ids, held-out text). The tokenizer is kept in `work`."""
    corpus = build_corpus()
    file = work / "tokenizer.json"
    if not file.exists():
        train_tokenizer(corpus.train(), CONFIG["vocab_size"]).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    documents = loosen_spaces(tokenizer, encode_documents(tokenizer, corpus.train()))
    sizes = {kind: len(getattr(corpus, kind)) for kind in ("code", "prose", "chat", "held_out")}
    console.print(f"documents {sizes}, {sum(map(len, documents))} training tokens")
    return tokenizer, documents, "".join(f"{BOS}{text}{EOS}" for text in corpus.held_out)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the finished checkpoint.")],
    minutes: Annotated[float, typer.Option(help="Training time; the schedule ends with it.")] = 30.0,
    work: Annotated[Path, typer.Option(help="Folder of the state to resume from.")] = WORK,
    first: Annotated[float, typer.Option(help="Minutes after which a first checkpoint is written; 0: none.")] = 0.0,
    bf16: Annotated[bool, typer.Option(help="Matrix products in bf16 (fast on CPUs with AMX).")] = True,
    fused: Annotated[bool, typer.Option(help="torch.compile the layers; needs a C++ compiler.")] = True,
) -> None:
    """Train the example model and write it, with the record of its training, to OUT."""
    work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    tokenizer, documents, held_out = prepare(work)
    files = static_files(tokenizer, held_out)
    trainer = Trainer(documents, work, minutes * 60, bf16, fused)
    try:
        if first:
            trainer.run(stop_after_s=first * 60)
            write_folder(out, files, checkpoint_tensors(trainer.model.state_dict()))
        trainer.run()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        raise typer.Exit(130) from None
    write_folder(out, files, checkpoint_tensors(trainer.model.state_dict()))
    record = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens_seen": trainer.at.tokens,
        "training_tokens_in_corpus": sum(map(len, documents)),
        "tokens_by_window_length": trainer.at.tokens_by_length,
        "schedules_minutes": trainer.at.schedules_minutes,
        "steps": trainer.at.step,
        "training_seconds": round(trainer.at.seconds),
        "tokens_per_second": round(trainer.at.tokens / trainer.at.seconds),
        "machine": f"{platform.machine().replace('_', '-')}, {os.cpu_count()} cores, CPU",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python examples/train_tiny_deepseek_v2.py --out {out} --minutes {minutes:g}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": SEED,
        **judge(out, documents),
    }
    write_record(out, record)
    console.print_json(data=record)


if __name__ == "__main__":
    typer.run(main)
