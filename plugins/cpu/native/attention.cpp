#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

using ort::Call;
using ort::require;
using ort::Tensor;

namespace {

// A new row: its place among the step's rows, the pages of its sequence, and how many tokens it attends to.
struct NewRow {
  int64_t row;
  const int32_t* pages;
  int tokens;
};

// The shapes of one call.
struct Sizes {
  int64_t rows, heads, rank, rope, pages, page_size, width, groups;
};

std::vector<NewRow> new_rows(const Call& call, const Sizes& sizes) {
  const Tensor table = call.input(5), cached = call.input(6), starts = call.input(7), count = call.input(8);
  const int64_t sequences = cached.size(), max_pages = table.dims.back();
  require(table.dims.size() == 2 && table.dims[0] == sequences && starts.size() == sequences + 1 && count.size() == 1,
          "block_table, cached_lengths and query_starts do not fit together");
  const int64_t valid = std::min<int64_t>(*count.as<int32_t>(), sizes.rows);
  std::vector<NewRow> found;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t first = std::min<int64_t>(starts.as<int32_t>()[b], valid);
    const int64_t last = std::min<int64_t>(starts.as<int32_t>()[b + 1], valid), past = cached.as<int32_t>()[b];
    const int32_t* pages = table.as<int32_t>() + b * max_pages;
    if (last <= first) continue;
    const int64_t used = (past + last - first + sizes.page_size - 1) / sizes.page_size;
    require(first >= 0 && past >= 0 && used <= max_pages, "a sequence has more tokens than its pages hold");
    require(std::all_of(pages, pages + used, [&](int32_t p) { return p >= 0 && p < sizes.pages; }), "a page does not exist");
    for (int64_t r = first; r < last; ++r) found.push_back({r, pages, int(past + r - first + 1)});
  }
  return found;
}

void append(const std::vector<NewRow>& rows, const Sizes& s, const float* latent, const float* k_pe, void* cache,
            bool half, const Kernels& kernels) {
  for (const NewRow& row : rows) {
    const int64_t position = row.tokens - 1, page = row.pages[position / s.page_size];
    const size_t cell = size_t(page * s.page_size + position % s.page_size) * s.width;
    const float *a = latent + row.row * s.rank, *b = k_pe + row.row * s.rope;
    if (half) {
      kernels.narrow(a, int(s.rank), static_cast<uint16_t*>(cache) + cell);
      kernels.narrow(b, int(s.rope), static_cast<uint16_t*>(cache) + cell + s.rank);
    } else {
      std::memcpy(static_cast<float*>(cache) + cell, a, s.rank * sizeof(float));
      std::memcpy(static_cast<float*>(cache) + cell + s.rank, b, s.rope * sizeof(float));
    }
  }
}

// The queries of QUERIES heads of a row (zeros where there are fewer heads), scaled: [width][QUERIES].
const float* queries(const float* q_latent, const float* q_pe, const NewRow& row, int64_t group, const Sizes& s, float scale) {
  static thread_local ort::Scratch memory;
  float* q = memory.of<float>(s.width * QUERIES);
  for (int64_t h = 0; h < QUERIES; ++h) {
    const int64_t head = group * QUERIES + h;
    const bool there = head < s.heads;
    const float* a = q_latent + (row.row * s.heads + head) * s.rank;
    const float* b = q_pe + (row.row * s.heads + head) * s.rope;
    for (int64_t d = 0; d < s.rank; ++d) q[d * QUERIES + h] = there ? a[d] * scale : 0;
    for (int64_t d = 0; d < s.rope; ++d) q[(s.rank + d) * QUERIES + h] = there ? b[d] * scale : 0;
  }
  return q;
}

// The sum over more tokens joins the sum over those before them.
void merge(Partial& sum, const Partial& next, int64_t rank) {
  for (int h = 0; h < QUERIES; ++h) {
    const float largest = std::max(sum.largest[h], next.largest[h]);
    const float a = std::exp(sum.largest[h] - largest), b = std::exp(next.largest[h] - largest);
    float* to = sum.values + h * rank;
    const float* from = next.values + h * rank;
    for (int64_t d = 0; d < rank; ++d) to[d] = to[d] * a + from[d] * b;
    sum.total[h] = sum.total[h] * a + next.total[h] * b;
    sum.largest[h] = largest;
  }
}

void finish(const Partial& sum, const NewRow& row, int64_t group, const Sizes& s, float* attended) {
  for (int64_t h = 0; h < QUERIES && group * QUERIES + h < s.heads; ++h) {
    float* to = attended + (row.row * s.heads + group * QUERIES + h) * s.rank;
    for (int64_t d = 0; d < s.rank; ++d) to[d] = sum.values[h * s.rank + d] / sum.total[h];
  }
}

int splits(const NewRow& row) { return (row.tokens + SPLIT - 1) / SPLIT; }

}  // namespace

void Attention::compute(const Call& call) const {
  const Tensor q_latent = call.input(0), q_pe = call.input(1), cache = call.input(4);
  require(q_latent.dims.size() == 3 && q_pe.dims.size() == 3 && cache.dims.size() == 3, "queries and cache have 3 axes");
  Sizes s{q_latent.dims[0], q_latent.dims[1], q_latent.dims[2], q_pe.dims[2], cache.dims[0], cache.dims[1], cache.dims[2], 0};
  s.groups = (s.heads + QUERIES - 1) / QUERIES;
  const Tensor latent = call.input(2), k_pe = call.input(3);
  require(s.width == s.rank + s.rope && latent.size() == s.rows * s.rank && k_pe.size() == s.rows * s.rope,
          "new tokens do not fit the cache");
  float* attended = call.output(0, q_latent.dims).as<float>();
  void* updated = call.output(1, cache.dims).data;
  if (updated != cache.data) std::memcpy(updated, cache.data, cache.size() * (half ? 2 : 4));
  std::fill_n(attended, s.rows * s.heads * s.rank, 0.0f);
  const std::vector<NewRow> rows = new_rows(call, s);
  const Kernels& kernels = ::kernels();
  append(rows, s, latent.as<float>(), k_pe.as<float>(), updated, half, kernels);

  const size_t one = QUERIES * s.rank;
  const auto sum_up = [&](const NewRow& row, const float* q, int split, Partial& result) {
    static thread_local ort::Scratch scratch;
    const Keys keys{updated, row.pages, int(s.page_size), int(s.width), int(s.rank), half};
    const int from = split * SPLIT, to = std::min(from + SPLIT, row.tokens);
    kernels.attend(q, keys, from, to, result, scratch.of<float>(scratch_floats(int(s.width))));
  };
  if (int64_t(rows.size()) * s.groups >= 32) {  // enough of them for any number of threads
    call.parallel(rows.size() * s.groups, [&](size_t i) {
      static thread_local ort::Scratch memory;
      const NewRow& row = rows[i / s.groups];
      const float* q = queries(q_latent.as<float>(), q_pe.as<float>(), row, i % s.groups, s, softmax_scale);
      float* values = memory.of<float>(2 * one);
      Partial sum{values, {}, {}}, next{values + one, {}, {}};
      sum_up(row, q, 0, sum);
      for (int split = 1; split < splits(row); ++split) {
        sum_up(row, q, split, next);
        merge(sum, next, s.rank);
      }
      finish(sum, row, i % s.groups, s, attended);
    });
    return;
  }
  struct Item {
    int64_t row, group;
    int split;
  };
  std::vector<Item> items;
  for (size_t r = 0; r < rows.size(); ++r)
    for (int64_t g = 0; g < s.groups; ++g)
      for (int k = 0; k < splits(rows[r]); ++k) items.push_back({int64_t(r), g, k});
  static thread_local ort::Scratch memory;
  float* values = memory.of<float>(items.size() * one);
  std::vector<Partial> parts(items.size());
  call.parallel(items.size(), [&](size_t i) {
    const NewRow& row = rows[items[i].row];
    parts[i].values = values + i * one;
    sum_up(row, queries(q_latent.as<float>(), q_pe.as<float>(), row, items[i].group, s, softmax_scale), items[i].split, parts[i]);
  });
  for (size_t i = 0; i < items.size();) {
    const size_t first = i++;
    for (; i < items.size() && items[i].split > 0; ++i) merge(parts[first], parts[i], s.rank);
    finish(parts[first], rows[items[first].row], items[first].group, s, attended);
  }
}

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
