// Attention over the paged latent cache, and the choice of experts.
#pragma once
#include "kernels.hpp"
#include "op.hpp"

// The contract of plugins/mla_attention/op.py, cache format float32 or float16.
struct Attention {
  float softmax_scale;
  bool half;

  explicit Attention(const ort::Attributes& given)
      : softmax_scale(given.real("softmax_scale")), half(given.text("cache_format") == "float16") {}
  void compute(const ort::Call& call) const;
};

// The contract of plugins/moe_route/op.py, without correction bias.
struct Route {
  bool softmax, limited, two_best;
  int64_t groups, groups_kept, top_k;
  bool normalize;
  float factor;

  explicit Route(const ort::Attributes& given)
      : softmax(given.text("scoring_func") == "softmax"), limited(given.text("topk_method") == "group_limited_greedy"),
        two_best(given.text("group_score") == "top2_sum"), groups(given.integer("n_group")),
        groups_kept(given.integer("topk_group")), top_k(given.integer("top_k")),
        normalize(given.integer("norm_topk_prob") != 0), factor(given.real("routed_scaling_factor")) {}
  void compute(const ort::Call& call) const;
};
