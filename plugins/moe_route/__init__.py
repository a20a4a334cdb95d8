"""Expert choice of DeepSeekMoE: scores, group limit, top-k, weights."""
