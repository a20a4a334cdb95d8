// Multi-head latent attention over the paged latent cache, from the projections of a layer's input to those of its heads.
#pragma once
#include "kernels.hpp"
#include "op.hpp"

#include <string>

// What a layer computes between its first and last linear product: the latent is normalized, queries and keys are rotated
// (pairs of neighbours), the new tokens are appended to the cache, and every head attends.
//
// q [T, heads * (nope + rope)], kv [T, rank + rope], norm [rank], cos and sin [T, rope / 2], cache [pages, page_size, a token's
// elements] of float32, float16 or, where it is packed (plugins/cache_formats), int32, block_table, cached_lengths, query_starts and num_tokens as plugins/mla_attention/op.py has them;
// w_uk [heads, rank x nope] and w_uv [heads, v_head_dim x rank] of 8 bits in panels, with scales. Gives [T, heads * v_head_dim],
// zero for rows of no sequence, and the cache.
//
// Two forms, chosen for each sequence by counting operations as runtime/backends/forms.py does. Absorbed attends in the latent
// space: a pair of a query and a token costs 2 rank + rope. Expanded makes keys and values of all tokens first: nope + rope + v.
struct Mla {
  enum Form { AUTO, ABSORBED, EXPANDED };
  float softmax_scale, epsilon;
  int64_t v_head_dim;
  std::string cache_format;
  Form form;

  explicit Mla(const ort::Attributes& given);
  void compute(const ort::Call& call) const;
};
