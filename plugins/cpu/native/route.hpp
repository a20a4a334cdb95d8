// The choice of experts.
#pragma once
#include "op.hpp"

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
