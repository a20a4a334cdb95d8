"""The routed experts of DeepSeekMoE."""
