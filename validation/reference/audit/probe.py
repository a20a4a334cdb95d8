"""transformers' own classes, built small with everything that decides a rule kept, run on random weights."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers

from latentrt.export.models.deepseek_v2.config import DeepseekV2Config
from latentrt.validation.errors import ReferenceRefused
from latentrt.validation.reference.audit.verdict import DEFAULT_ADVICE
from latentrt.validation.reference.weights import parameter_view

TOKENS, FIRST_POSITION = 128, 200
SMALL = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "v_head_dim": 16,
    "intermediate_size": 32, "moe_intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@dataclass
class Probe:
    """What went into and came out of one small decoder layer of transformers."""

    positions: np.ndarray  # [T]
    embeds: np.ndarray  # [T, D]
    normed: np.ndarray  # [T, D] input of self_attn
    attended: np.ndarray  # [T, D] output of self_attn
    mlp_input: np.ndarray  # [T, D]
    mlp_output: np.ndarray  # [T, D]
    topk: tuple[np.ndarray, np.ndarray] | None  # ids and weights [T, top_k]
    weights: dict[str, np.ndarray]  # of the layer, by checkpoint name without "model.layers.0."


def build(raw: dict, overrides: dict) -> torch.nn.Module:
    """transformers' DeepseekV2ForCausalLM for config.json `raw` with some fields replaced; random weights."""
    raw = {**raw, **overrides}
    if raw.get("n_shared_experts") is None:
        raw["n_shared_experts"] = 0  # the same model; transformers does not take null
    try:
        hf = transformers.DeepseekV2Config.from_dict({k: v for k, v in raw.items() if k != "auto_map"})
        hf._attn_implementation = "eager"
        hf._experts_implementation = "eager"  # the others want sizes that are multiples of 16 bytes
        return transformers.DeepseekV2ForCausalLM(hf).eval()
    except Exception as error:  # whatever transformers raises: strict config errors, missing features, bugs
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReferenceRefused(f"transformers {transformers.__version__} cannot build this model: {first}") from error


def small_config(config: DeepseekV2Config) -> DeepseekV2Config:
    known = {k: v for k, v in SMALL.items() if k in type(config).model_fields}
    return config.model_copy(update=known | {"q_lora_rank": 32 if config.q_lora_rank else None})


def run_layer(config: DeepseekV2Config, raw: dict, moe: bool, latent_gain: float, tied_router: bool = False) -> Probe:
    """Runs one decoder layer on random weights, away from position 0, but not so far that float32 angles round visibly."""
    small = SMALL | {"q_lora_rank": config.q_lora_rank, "first_k_dense_replace": 0 if moe else 1, "moe_layer_freq": 1}
    model = build(raw, small)
    weights = _randomize(model, config, moe, latent_gain, tied_router)
    captured, layer = {}, model.model.layers[0]
    layer.self_attn.register_forward_hook(
        lambda m, args, kwargs, out: captured.update(normed=kwargs.get("hidden_states", *args[:1]), attended=out[0]),
        with_kwargs=True,
    )
    layer.mlp.register_forward_hook(lambda m, args, out: captured.update(mlp_input=args[0], mlp_output=out))
    if moe:
        layer.mlp.gate.register_forward_hook(lambda m, args, out: captured.update(gate=out))
    positions = torch.arange(FIRST_POSITION, FIRST_POSITION + TOKENS)
    embeds = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(1)) * 1e-2
    with torch.no_grad():
        model.model(
            inputs_embeds=embeds[None], position_ids=positions[None], attention_mask=torch.ones(1, TOKENS), use_cache=False
        )
    arrays = {k: _flat(v) for k, v in captured.items() if k != "gate"}
    topk = topk_of(captured["gate"], config.num_experts_per_tok) if moe else None
    return Probe(positions.numpy().astype(np.float64), _flat(embeds), topk=topk, weights=weights, **arrays)


def _randomize(model, config: DeepseekV2Config, moe: bool, latent_gain: float, tied_router: bool) -> dict[str, np.ndarray]:
    """Weights that keep every activation near 1 and scores spread; returns the layer's, in float64."""
    generator = torch.Generator().manual_seed(0)
    gains = {"q_proj": 3.0, "q_b_proj": 3.0, "gate.weight": 2.0, "kv_a_proj": latent_gain}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            values = torch.randn(p.shape, generator=generator)
            gain = next((g for part, g in gains.items() if part in name), 1.0)
            fan_in = max(p.shape[-1], 1) if p.dim() > 1 else 10
            p.copy_(1 + 0.3 * values if "norm" in name else values * gain * fan_in**-0.5)
        if tied_router:
            gate = parameters["model.layers.0.mlp.gate.weight"]
            gate.copy_(gate[: max(1, len(gate) // 4)].repeat(5, 1)[: len(gate)])
    names = [n for n in parameters if n.startswith("model.layers.0.") and ".mlp.experts." not in n]
    if moe:
        experts = [f"model.layers.0.mlp.experts.{e}.{k}_proj.weight" for e in range(config.n_routed_experts)
                   for k in ("gate", "up", "down")]  # fmt: skip
        names += experts
    return {n.removeprefix("model.layers.0."): parameter_view(parameters, n).double().numpy() for n in names}


def topk_of(gate_output, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and weights [T, top_k] in what transformers' gate returns (the order differs between versions)."""
    parts = [t.detach() for t in gate_output if isinstance(t, torch.Tensor)]
    ids = next((t for t in parts if not t.is_floating_point() and t.shape[-1] == top_k), None)
    weights = next((t for t in reversed(parts) if t.is_floating_point() and ids is not None and t.shape == ids.shape), None)
    if ids is None or weights is None:
        raise ReferenceRefused(
            f"transformers {transformers.__version__}: the gate returns {[list(p.shape) for p in parts]}, expected ids and "
            f"weights [T, {top_k}]; {DEFAULT_ADVICE}"
        )
    return ids.reshape(-1, top_k).numpy(), weights.reshape(-1, top_k).double().numpy()


def _flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().reshape(-1, tensor.shape[-1]).numpy()
