"""The reference: transformers' DeepseekV2ForCausalLM in float32, audited, on the checkpoint's own or on given weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers

from latentrt.export.checkpoint import Checkpoint
from latentrt.validation.errors import ReferenceRefused
from latentrt.validation.reference.audit import AuditCheck, audit, topk_of
from latentrt.validation.reference.audit.probe import build
from latentrt.validation.reference.audit.verdict import DEFAULT_ADVICE
from latentrt.validation.reference.weights import differing, fill


@dataclass(frozen=True)
class Routing:
    """One MoE layer's routing of T tokens. Input and weights are None where they were not recorded."""

    router_input: np.ndarray | None  # [T, hidden_size]
    router_logits: np.ndarray  # [T, E]
    ids: np.ndarray  # [T, top_k]
    weights: np.ndarray | None  # [T, top_k]


@dataclass
class Trace:
    """What one sequence of T tokens went through. Lists are by layer."""

    logits: np.ndarray | None = None  # [T, vocab_size]
    embedding: np.ndarray | None = None  # [T, hidden_size]
    attention: list[np.ndarray] = field(default_factory=list)  # [T, hidden_size] output of self_attn
    mlp: list[np.ndarray] = field(default_factory=list)  # [T, hidden_size] output of the MLP or MoE block
    hidden: list[np.ndarray] = field(default_factory=list)  # [T, hidden_size] after the layer
    routing: dict[int, Routing] = field(default_factory=dict)


class Reference:
    """transformers' model of a checkpoint. Raises ReferenceRefused if transformers or the loaded weights fail the audit."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        raw = auditable(checkpoint)
        self.audit: list[AuditCheck] = audit(self.config, raw)
        if checkpoint.is_plain:
            self.model, self.weights = self._load(raw), "the checkpoint's weights"
        else:  # transformers does not read these, or rounds them otherwise than the format's own tool
            self.model, self.weights = self._filled(raw), f"the checkpoint's weights, decoded to float32 ({checkpoint.storage})"

    def _load(self, raw: dict) -> torch.nn.Module:
        """from_pretrained, as any user would, and then a comparison of every parameter with the checkpoint's tensors."""
        if raw.get("n_shared_experts") is None:
            raw = raw | {"n_shared_experts": 0}
        with quiet_transformers():
            try:
                model, info = transformers.DeepseekV2ForCausalLM.from_pretrained(
                    self.checkpoint.path, config=transformers.DeepseekV2Config.from_dict(raw), dtype=torch.float32,
                    attn_implementation="eager", experts_implementation="eager", output_loading_info=True,
                    use_safetensors=True, trust_remote_code=False,
                )  # fmt: skip
            except Exception as error:  # as in audit/probe.py: anything may come out of transformers
                raise ReferenceRefused(
                    f"transformers {transformers.__version__} cannot load {self.checkpoint.path}: {error}"
                ) from error
        missing = {str(k) for k in info["missing_keys"]} - ({"lm_head.weight"} if self.config.tie_word_embeddings else set())
        wrong = sorted(missing) or differing(model, self.checkpoint.tensors, self.checkpoint.read)
        if wrong:
            raise ReferenceRefused(
                f"transformers {transformers.__version__} loaded {len(wrong)} tensors otherwise than the checkpoint has them, "
                f"{wrong[0]} first; {DEFAULT_ADVICE}"
            )
        return model.eval().requires_grad_(False)

    def _filled(self, raw: dict) -> torch.nn.Module:
        """transformers' module with every tensor as our reader decodes it (held to the formats' own tools by tests)."""
        model = build(raw, {}).requires_grad_(False)
        fill(model, ((name, self.checkpoint.read(name)) for name in self.checkpoint.tensors))
        return model

    def use_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
        """Replaces all weights in place (`dequantize.dequantized_tensors`); `name` says what they are."""
        with torch.no_grad():
            fill(self.model, tensors)
        self.weights = name

    def gate(self, layer: int) -> np.ndarray:
        """The router's weights [E, hidden_size] of an MoE layer."""
        return self.model.model.layers[layer].mlp.gate.weight.float().numpy()

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [T] -> logits [T, vocab_size] float32."""
        return self.model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0].numpy()

    @torch.no_grad()
    def trace(self, tokens: np.ndarray) -> Trace:
        """Logits with everything on the way, from forward hooks."""
        trace, handles = Trace(), []
        for index, layer in enumerate(self.model.model.layers):
            handles.append(layer.register_forward_hook(lambda m, a, out: trace.hidden.append(_rows(out))))
            handles.append(layer.self_attn.register_forward_hook(lambda m, a, out: trace.attention.append(_rows(out))))
            handles.append(layer.mlp.register_forward_hook(lambda m, a, out: trace.mlp.append(_rows(out))))
            if hasattr(layer.mlp, "gate"):
                handles.append(layer.mlp.gate.register_forward_hook(self._gate_hook(trace, index)))
        handles.append(
            self.model.model.embed_tokens.register_forward_hook(lambda m, a, out: setattr(trace, "embedding", _rows(out)))
        )
        try:
            trace.logits = self.logits(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return trace

    def _gate_hook(self, trace: Trace, layer: int):
        def hook(module, args, output):
            x = _rows(args[0])
            ids, weights = topk_of(output, self.config.num_experts_per_tok)
            logits = x @ module.weight.float().numpy().T
            trace.routing[layer] = Routing(x, logits, ids.astype(np.int32), weights.astype(np.float32))

        return hook


def auditable(checkpoint: Checkpoint) -> dict:
    """config.json as transformers takes it: one key and value head means the same in MLA as all, and it fails on one."""
    raw = {k: v for k, v in checkpoint.raw.items() if k not in ("quantization_config", "auto_map")}
    return raw | {"num_key_value_heads": checkpoint.config.num_attention_heads}


def _rows(value) -> np.ndarray:
    tensor = value[0] if isinstance(value, tuple) else value
    return tensor.detach().float().reshape(-1, tensor.shape[-1]).numpy().copy()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Mutes transformers' progress bars and notes."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
