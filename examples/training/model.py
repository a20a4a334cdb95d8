"""transformers' own DeepseekV2ForCausalLM, with experts that train fast on CPUs, and a watch on its routers."""

import torch
import torch.nn.functional as F
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from examples.training.config import CONFIG, SEED


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


def fuse(model: DeepseekV2ForCausalLM) -> None:
    """Compile the parts of each layer in place; the routers stay as they are, because `RouterWatch` hooks them."""
    for layer in model.model.layers:
        mlp = layer.mlp
        parts = [mlp.experts, mlp.shared_experts] if hasattr(mlp, "gate") else [mlp]
        for part in [layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn, *parts]:
            part.compile(dynamic=False)


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
