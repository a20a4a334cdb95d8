"""All TensorRT plugins, in one list."""

from plugins.mla_attention import trt as mla_attention
from plugins.mla_prefill import trt as mla_prefill
from plugins.moe_experts import trt as moe_experts
from plugins.moe_route import trt as moe_route

OPS = (mla_attention.OP, mla_prefill.OP, moe_route.OP, moe_experts.OP)
