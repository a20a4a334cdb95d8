#include "route.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

using ort::Call;
using ort::require;
using ort::Tensor;

namespace {

void to_scores(const float* logits, int64_t experts, bool softmax, float* scores) {
  if (!softmax) {
    for (int64_t e = 0; e < experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  const float largest = *std::max_element(logits, logits + experts);
  float sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += scores[e] = std::exp(logits[e] - largest);
  for (int64_t e = 0; e < experts; ++e) scores[e] /= sum;
}

// The places of the k largest values, the larger first, of equal ones the lower place first.
void largest_places(const float* values, int64_t count, int64_t k, int32_t* places) {
  std::vector<char> taken(count, 0);
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
      if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    taken[best] = 1;
    places[j] = int32_t(best);
  }
}

}  // namespace

void Route::compute(const Call& call) const {
  const Tensor logits = call.input(0), count = call.input(1);
  require(logits.dims.size() == 2 && top_k <= logits.dims[1], "fewer experts than are chosen");
  const int64_t rows = logits.dims[0], experts = logits.dims[1], each = experts / groups;
  require(each * groups == experts && groups_kept <= groups, "groups do not fit the experts");
  int32_t* ids = call.output(0, {rows, top_k}).as<int32_t>();
  float* weights = call.output(1, {rows, top_k}).as<float>();
  std::vector<float> scores(experts), best(groups);
  std::vector<int32_t> kept(groups_kept);
  for (int64_t t = 0; t < rows; ++t, ids += top_k, weights += top_k) {
    if (t >= *count.as<int32_t>()) {
      std::fill_n(ids, top_k, -1);
      std::fill_n(weights, top_k, 0.0f);
      continue;
    }
    to_scores(logits.as<float>() + t * experts, experts, softmax, scores.data());
    if (limited) {
      for (int64_t g = 0; g < groups; ++g) {
        std::vector<float> group(scores.begin() + g * each, scores.begin() + (g + 1) * each);
        std::partial_sort(group.begin(), group.begin() + (two_best ? 2 : 1), group.end(), std::greater<float>());
        best[g] = two_best ? group[0] + group[1] : group[0];
      }
      largest_places(best.data(), groups, groups_kept, kept.data());
      for (int64_t e = 0; e < experts; ++e)
        if (std::find(kept.begin(), kept.end(), int32_t(e / each)) == kept.end()) scores[e] = 0;
    }
    largest_places(scores.data(), experts, top_k, ids);
    float sum = 1e-20f;
    for (int64_t j = 0; j < top_k; ++j) sum += weights[j] = scores[ids[j]];
    for (int64_t j = 0; j < top_k; ++j) weights[j] = (normalize ? weights[j] / sum : weights[j]) * factor;
  }
}
