#include "mla.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cells.hpp"
#include "products.hpp"

using ort::Call;
using ort::require;
using ort::Tensor;

namespace {

// What a multiplication of small integers takes of the time of one of float32, with the rounding of activations. With it the
// choice of a form was the faster one in 15 of 17 cases on a processor with AVX-512 VNNI, and near even in the others.
constexpr double INTEGER_COST = 1.0 / 3;

// A sequence's new rows, which follow `past` tokens in its pages.
struct Sequence {
  int64_t first, rows, past;
  const int32_t* pages;
  int64_t tokens() const { return past + rows; }
};

struct NewRow {
  const Sequence* sequence;
  int64_t row;
  int64_t tokens() const { return sequence->past + row - sequence->first + 1; }  // that it attends to
};

// Shapes of one call, and where cells of the cache lie.
struct Layer {
  Cells cells;
  int64_t rows, heads, nope, rope, rank, v, pages, page_size, width;  // width: rank + rope
  uint8_t* cache;

  uint8_t* cell(const Sequence& s, int64_t t) const {
    return cache + (size_t(s.pages[t / page_size]) * page_size + t % page_size) * cells.bytes();
  }
  // A token as float32, in `wide` if it is not stored so.
  const float* read(const Kernels& kernels, const Sequence& s, int64_t t, float* wide) const {
    if (cells.plain()) return reinterpret_cast<const float*>(cell(s, t));
    cells.read(kernels, cell(s, t), wide);
    return wide;
  }
};

std::vector<Sequence> sequences_of(const Call& call, const Layer& layer) {
  const Tensor table = call.input(6), cached = call.input(7), starts = call.input(8), count = call.input(9);
  const int64_t sequences = cached.size(), max_pages = table.dims.back();
  require(table.dims.size() == 2 && table.dims[0] == sequences && starts.size() == sequences + 1 && count.size() == 1,
          "block_table, cached_lengths and query_starts do not fit together");
  const int64_t valid = std::min<int64_t>(*count.as<int32_t>(), layer.rows);
  std::vector<Sequence> found;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t first = std::min<int64_t>(starts.as<int32_t>()[b], valid);
    const int64_t last = std::min<int64_t>(starts.as<int32_t>()[b + 1], valid), past = cached.as<int32_t>()[b];
    const int32_t* pages = table.as<int32_t>() + b * max_pages;
    if (last <= first) continue;
    const int64_t used = (past + last - first + layer.page_size - 1) / layer.page_size;
    require(first >= 0 && past >= 0 && used <= max_pages, "a sequence has more tokens than its pages hold");
    require(std::all_of(pages, pages + used, [&](int32_t p) { return p >= 0 && p < layer.pages; }), "a page does not exist");
    found.push_back({first, last - first, past, pages});
  }
  return found;
}

void rotate(const float* x, const float* cos, const float* sin, int64_t pairs, float* to) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    to[2 * i] = a * cos[i] - b * sin[i];
    to[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

void normalize(const float* x, const float* weight, int64_t count, float epsilon, float* to) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += double(x[i]) * x[i];
  const float factor = 1.0f / std::sqrt(float(sum / count) + epsilon);
  for (int64_t i = 0; i < count; ++i) to[i] = x[i] * factor * weight[i];
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

constexpr int64_t UNPACKED = 128;  // tokens of a packed cache that are unpacked at a time

int splits(int64_t tokens) { return int((tokens + SPLIT - 1) / SPLIT); }

// Rows attend to latents; queries and results [rows, heads, rank], q_pe [T, heads, rope].
class Absorbed {
 public:
  Absorbed(const Call& call, const Kernels& kernels, const Layer& layer, const std::vector<NewRow>& rows, const float* q_latent,
           const float* q_pe, float scale, float* attended)
      : call_(call), kernels_(kernels), layer_(layer), rows_(rows), q_latent_(q_latent), q_pe_(q_pe), scale_(scale),
        attended_(attended), groups_((layer.heads + QUERIES - 1) / QUERIES), one_(QUERIES * layer.rank),
        whole_rows_(rows.size() * groups_ >= 32) {  // enough of them for any number of threads
    if (whole_rows_) return;
    for (size_t r = 0; r < rows.size(); ++r)
      for (size_t g = 0; g < groups_; ++g) {
        starts_.push_back(items_.size());
        for (int k = 0; k < splits(rows[r].tokens()); ++k) items_.push_back({r, g, k});
      }
    static thread_local ort::Scratch memory, query_memory;
    queries_.resize(rows.size() * groups_);
    auto* given = query_memory.of<float>(queries_.size() * query_size());
    for (size_t i = 0; i < queries_.size(); ++i) queries_[i].q = given + i * query_size();
    float* values = memory.of<float>(items_.size() * one_);
    parts_.resize(items_.size());
    for (size_t i = 0; i < items_.size(); ++i) parts_[i].values = values + i * one_;
  }

  // Queries of rows that are worked on in parts.
  int64_t query_tasks() const { return int64_t(queries_.size()); }

  void query_task(size_t i) { prepare(i / groups_, i % groups_, queries_[i]); }

  // What is left of a row's own work, or where rows are few, of a row's SPLIT tokens.
  int64_t attend_tasks() const { return whole_rows_ ? int64_t(rows_.size() * groups_) : int64_t(items_.size()); }

  void attend_task(size_t i) {
    if (!whole_rows_) {
      attend(items_[i].row, queries_[items_[i].row * groups_ + items_[i].group], items_[i].split, parts_[i]);
      return;
    }
    static thread_local ort::Scratch memory, query_memory;
    const size_t row = i / groups_, group = i % groups_;
    Queries q;
    q.q = query_memory.of<float>(query_size());
    prepare(row, group, q);
    float* values = memory.of<float>(2 * one_);
    Partial sum{values, {}, {}}, next{values + one_, {}, {}};
    attend(row, q, 0, sum);
    for (int split = 1; split < splits(rows_[row].tokens()); ++split) {
      attend(row, q, split, next);
      merge(sum, next, layer_.rank);
    }
    finish(sum, row, group);
  }

  // Sums of SPLIT tokens are joined.
  int64_t merge_tasks() const { return int64_t(starts_.size()); }

  void merge_task(size_t i) {
    const size_t first = starts_[i], end = i + 1 < starts_.size() ? starts_[i + 1] : items_.size();
    for (size_t k = first + 1; k < end; ++k) merge(parts_[first], parts_[k], layer_.rank);
    finish(parts_[first], items_[first].row, items_[first].group);
  }

 private:
  struct Queries {
    float* q;  // [width][QUERIES]
    WholeQueries whole;  // for cells of whole numbers
  };

  size_t query_size() const { return size_t(layer_.width * QUERIES * (layer_.cells.whole() ? 2 : 1)); }

  // The queries of QUERIES heads of a row (zeros where there are fewer heads), scaled.
  void prepare(size_t row, size_t group, Queries& to) const {
    float* q = to.q;
    for (int64_t h = 0; h < QUERIES; ++h) {
      const int64_t head = group * QUERIES + h;
      const bool there = head < layer_.heads;
      const float* a = q_latent_ + (row * layer_.heads + head) * layer_.rank;
      const float* b = q_pe_ + (rows_[row].row * layer_.heads + head) * layer_.rope;
      for (int64_t d = 0; d < layer_.rank; ++d) q[d * QUERIES + h] = there ? a[d] * scale_ : 0;
      for (int64_t d = 0; d < layer_.rope; ++d) q[(layer_.rank + d) * QUERIES + h] = there ? b[d] * scale_ : 0;
    }
    if (!layer_.cells.whole()) return;
    to.whole.pairs = reinterpret_cast<int32_t*>(q + layer_.width * QUERIES);
    kernels_.round_queries(q, int(layer_.rank), int(layer_.width), to.whole);
  }

  void attend(size_t row, const Queries& queries, int split, Partial& result) const {
    const int64_t from = int64_t(split) * SPLIT, to = std::min<int64_t>(from + SPLIT, rows_[row].tokens());
    const float* q = queries.q;
    if (layer_.cells.plain()) return attend(row, q, from, to, result);
    if (layer_.cells.whole()) return attend(row, queries.whole, from, to, result);
    // Tokens that are unpacked should stay in the second cache until they have been read twice.
    static thread_local ort::Scratch memory;
    Partial next{memory.of<float>(one_), {}, {}};
    attend(row, q, from, std::min(from + UNPACKED, to), result);
    for (int64_t t = from + UNPACKED; t < to; t += UNPACKED) {
      attend(row, q, t, std::min(t + UNPACKED, to), next);
      merge(result, next, layer_.rank);
    }
  }

  void attend(size_t row, const WholeQueries& q, int64_t from, int64_t to, Partial& result) const {
    static thread_local ort::Scratch memory;
    const uint8_t* cells[SPLIT];
    for (int64_t t = from; t < to; ++t) cells[t - from] = layer_.cell(*rows_[row].sequence, t);
    const WholeTokens tokens{cells, int(to - from), layer_.cells.layout()};
    kernels_.attend_whole(q, tokens, result, memory.bytes(tokens.scratch()));
  }

  void attend(size_t row, const float* q, int64_t from, int64_t to, Partial& result) const {
    static thread_local ort::Scratch memory, wide_memory;
    const bool plain = layer_.cells.plain();
    float* wide = wide_memory.of<float>(plain ? 0 : SPLIT * layer_.width);
    const float* cells[SPLIT];
    for (int64_t t = from; t < to; ++t)
      cells[t - from] = plain ? layer_.read(kernels_, *rows_[row].sequence, t, nullptr) : wide + (t - from) * layer_.width;
    const auto unpack = [&](int first, int last) {
      for (int t = first; t < last; ++t) layer_.read(kernels_, *rows_[row].sequence, from + t, wide + t * layer_.width);
    };
    const auto make = [](const void* f, int first, int last) { (*static_cast<const decltype(unpack)*>(f))(first, last); };
    const Tokens tokens{cells, cells, int(to - from), int(layer_.width), int(layer_.rank), nullptr, plain ? nullptr : +make, &unpack};
    kernels_.attend(q, tokens, result, memory.of<float>(SPLIT * QUERIES));
  }

  void finish(const Partial& sum, size_t row, size_t group) const {
    for (int64_t h = 0; h < QUERIES && int64_t(group) * QUERIES + h < layer_.heads; ++h) {
      float* to = attended_ + (row * layer_.heads + group * QUERIES + h) * layer_.rank;
      for (int64_t d = 0; d < layer_.rank; ++d) to[d] = sum.values[h * layer_.rank + d] / sum.total[h];
    }
  }

  const Call& call_;
  const Kernels& kernels_;
  const Layer& layer_;
  const std::vector<NewRow>& rows_;
  const float *q_latent_, *q_pe_;
  float scale_;
  float* attended_;
  size_t groups_, one_;
  bool whole_rows_;
  struct Item {
    size_t row, group;
    int split;
  };
  std::vector<Item> items_;
  std::vector<Queries> queries_;  // by rows, then groups
  std::vector<size_t> starts_;  // of a row's and group's items
  std::vector<Partial> parts_;
};

// A sequence's rows attend to keys and values, which are made of the latents for one head and SPLIT tokens at a time.
class Expanded {
 public:
  Expanded(const Call& call, const Kernels& kernels, const Layer& layer, const Matrix& w_uk, const Matrix& w_uv, const float* q,
           const float* q_pe, float scale, float* out)
      : call_(call), kernels_(kernels), layer_(layer), w_uk_(w_uk), w_uv_(w_uv), q_(q), q_pe_(q_pe), scale_(scale), out_(out) {
    block_ = transposed_block(layer.rank);
  }

  // Inputs that share a scale where keys are made; 0 where the matrix does not allow that.
  static int transposed_block(int64_t rank) {
    for (int block : {128, 64, 32, 16, 8})
      if (rank % block == 0) return block;
    return 0;
  }

  void run(const Sequence& sequence) {
    static thread_local ort::Scratch wide_memory;
    static thread_local Quantized memory;
    const int64_t tokens = sequence.tokens();
    const int64_t stride = layer_.cells.plain() ? 0 : layer_.width;
    float* wide = wide_memory.of<float>(tokens * stride);
    std::vector<const float*> cells(tokens);
    const auto read = [&](size_t i) {
      for (int64_t t = i * SPLIT; t < std::min<int64_t>(tokens, (i + 1) * SPLIT); ++t)
        cells[t] = layer_.read(kernels_, sequence, t, wide + t * stride);
    };
    Quantized& latents = memory;
    latents.prepare(tokens, w_uv_, int(layer_.rank));
    const auto quantize = [&](size_t i) { latents.fill(i, kernels_, [&](int64_t t) { return cells[t]; }); };
    const auto attend = [&](size_t h) { head(sequence, h, cells.data(), latents.rows()); };
    call_.run({{int64_t(splits(tokens)), read}, {latents.tasks(), quantize}, {layer_.heads, attend}});
  }

 private:
  void head(const Sequence& sequence, int64_t h, const float* const* cells, const Row* latents) const {
    static thread_local ort::Scratch weight_memory, key_memory, value_memory, query_memory, sum_memory, part_memory, score_memory;
    const int64_t tiles = (sequence.rows + QUERIES - 1) / QUERIES, width = layer_.nope + layer_.rope, v = layer_.v;
    const Matrix keys_of = transposed(h, weight_memory), values_of = part(w_uv_, h);
    float* keys = key_memory.of<float>(SPLIT * width);
    float* values = value_memory.of<float>(SPLIT * v);
    float* q = query_memory.of<float>(tiles * width * QUERIES);
    float* sums = sum_memory.of<float>(tiles * QUERIES * v);
    float* scores = score_memory.of<float>(SPLIT * QUERIES);
    Partial next{part_memory.of<float>(QUERIES * v), {}, {}};
    std::vector<Partial> sum(tiles);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      sum[tile].values = sums + tile * QUERIES * v;
      queries(sequence, h, tile, q + tile * width * QUERIES);
    }
    const float *key[SPLIT], *value[SPLIT];
    for (int t = 0; t < SPLIT; ++t) key[t] = keys + t * width, value[t] = values + t * v;
    for (int64_t from = 0; from < sequence.tokens(); from += SPLIT) {
      const int count = int(std::min<int64_t>(SPLIT, sequence.tokens() - from));
      expand(h, cells + from, latents + from, count, keys_of, values_of, keys, values);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        int seen[QUERIES], most = 0;
        for (int i = 0; i < QUERIES; ++i) {
          const int64_t row = std::min<int64_t>(tile * QUERIES + i, sequence.rows - 1);
          seen[i] = int(std::clamp<int64_t>(sequence.past + row + 1 - from, 0, count));
          most = std::max(most, seen[i]);
        }
        if (!most) continue;
        const bool all = *std::min_element(seen, seen + QUERIES) == most;
        const Tokens tokens{key, value, most, int(width), int(v), all ? nullptr : seen, nullptr, nullptr};
        Partial& result = from ? next : sum[tile];
        kernels_.attend(q + tile * width * QUERIES, tokens, result, scores);
        if (from) merge(sum[tile], next, v);
      }
    }
    for (int64_t r = 0; r < sequence.rows; ++r) {
      const Partial& found = sum[r / QUERIES];
      const int64_t i = r % QUERIES;
      float* to = out_ + ((sequence.first + r) * layer_.heads + h) * v;
      for (int64_t d = 0; d < v; ++d) to[d] = found.values[i * v + d] / found.total[i];
    }
  }

  // w_uk of a head with outputs and inputs in each other's place, [nope][rank]; its scales belong to the inputs now.
  Matrix transposed(int64_t h, ort::Scratch& memory) const {
    const Matrix from = part(w_uk_, h);
    Matrix to{nullptr, nullptr, layer_.nope, int(layer_.rank / block_), block_, 8};
    const size_t size = size_t(to.panels()) * PANEL * layer_.rank, scales = size_t(to.panels()) * PANEL * to.blocks;
    auto* q = static_cast<uint8_t*>(memory.bytes(size + scales * sizeof(float)));
    auto* scale = reinterpret_cast<float*>(q + size);
    std::fill_n(scale, scales, 1.0f);
    if (layer_.nope % PANEL) std::memset(q, 0, size);
    kernels_.transpose(from.q, int(layer_.rank), int(layer_.nope), int(from.row_bytes()), q);
    to.q = q, to.scale = scale;
    return to;
  }

  // The queries of a head of QUERIES rows (zeros where there are fewer), scaled: [nope + rope][QUERIES].
  void queries(const Sequence& sequence, int64_t h, int64_t tile, float* q) const {
    for (int64_t i = 0; i < QUERIES; ++i) {
      const bool there = tile * QUERIES + i < sequence.rows;
      const int64_t row = sequence.first + (there ? tile * QUERIES + i : 0);
      const float* a = q_ + (row * layer_.heads + h) * (layer_.nope + layer_.rope);
      const float* b = q_pe_ + (row * layer_.heads + h) * layer_.rope;
      for (int64_t d = 0; d < layer_.nope; ++d) q[d * QUERIES + i] = there ? a[d] * scale_ : 0;
      for (int64_t d = 0; d < layer_.rope; ++d) q[(layer_.nope + d) * QUERIES + i] = there ? b[d] * scale_ : 0;
    }
  }

  void expand(int64_t h, const float* const* cells, const Row* latents, int count, const Matrix& keys_of, const Matrix& values_of,
              float* keys, float* values) const {
    static thread_local ort::Scratch memory, q_memory, scale_memory, sum_memory, rows_memory;
    const int64_t rank = layer_.rank, width = layer_.nope + layer_.rope;
    const float* scale = part(w_uk_, h).scale;  // [rank], as there is one block
    float* x = memory.of<float>(rank);
    auto* q = q_memory.of<int8_t>(count * rank);
    auto* scales = scale_memory.of<float>(count * keys_of.blocks);
    auto* sums = sum_memory.of<int32_t>(count * keys_of.blocks);
    auto* rows = rows_memory.of<Row>(count);
    for (int t = 0; t < count; ++t) {
      for (int64_t r = 0; r < rank; ++r) x[r] = cells[t][r] * scale[r];
      rows[t] = Row{q + t * rank, scales + t * keys_of.blocks, sums + t * keys_of.blocks};
      kernels_.quantize(x, int(rank), keys_of.blocks, block_, 8, q + t * rank, scales + t * keys_of.blocks, sums + t * keys_of.blocks);
      std::memcpy(keys + t * width + layer_.nope, cells[t] + rank, layer_.rope * sizeof(float));
    }
    fill(rows, count, keys_of, keys, width);
    fill(latents, count, values_of, values, layer_.v);
  }

  void fill(const Row* rows, int count, const Matrix& w, float* to, int64_t stride) const {
    for (int64_t first = 0; first < w.outputs; first += CHUNK) {
      const float* out = chunk(kernels_, rows, count, w, first);
      const int64_t n = std::min<int64_t>(CHUNK, w.outputs - first);
      for (int t = 0; t < count; ++t) std::memcpy(to + t * stride + first, out + t * CHUNK, n * sizeof(float));
    }
  }

  const Call& call_;
  const Kernels& kernels_;
  const Layer& layer_;
  const Matrix &w_uk_, &w_uv_;
  const float *q_, *q_pe_;
  float scale_;
  float* out_;
  int block_;
};

// Whether keys and values of all tokens are the smaller work; all counts are of one head.
bool expanded_is_less(const Layer& layer, const Sequence& s) {
  const double rows = double(s.rows), pairs = rows * s.past + rows * (rows + 1) / 2;
  const double up = INTEGER_COST * layer.rank * (layer.nope + layer.v);
  const double absorbed = pairs * (2 * layer.rank + layer.rope) + rows * up;
  return pairs * (layer.nope + layer.rope + layer.v) + double(s.tokens()) * up + double(layer.rank) * layer.nope < absorbed;
}

}  // namespace

Mla::Mla(const ort::Attributes& given)
    : softmax_scale(given.real("softmax_scale")), epsilon(given.real("epsilon")), v_head_dim(given.integer("v_head_dim")),
      cache_format(given.text("cache_format")) {
  const std::string asked = given.text("form");
  form = asked == "absorbed" ? ABSORBED : asked == "expanded" ? EXPANDED : AUTO;
}

void Mla::compute(const Call& call) const {
  const Tensor q = call.input(0), kv = call.input(1), norm = call.input(2), cos = call.input(3), sin = call.input(4);
  const Tensor cache = call.input(5), uk = call.input(10), uv = call.input(12);
  require(q.dims.size() == 2 && kv.dims.size() == 2 && cos.dims.size() == 2 && cache.dims.size() == 3 && uk.dims.size() == 6,
          "q, kv, cos, cache or w_uk has other axes than Mla takes");
  Layer layer{Cells(cache_format, norm.size(), 2 * cos.dims[1])};
  layer.rows = q.dims[0], layer.heads = uk.dims[0], layer.rope = 2 * cos.dims[1], layer.rank = norm.size();
  layer.nope = q.dims[1] / layer.heads - layer.rope, layer.v = v_head_dim, layer.width = layer.rank + layer.rope;
  layer.pages = cache.dims[0], layer.page_size = cache.dims[1];
  const size_t element = cache_format == "float16" ? 2 : 4;
  require(layer.nope > 0 && q.dims[1] == layer.heads * (layer.nope + layer.rope) && kv.dims[0] == layer.rows &&
              kv.dims[1] == layer.width && cache.dims[2] * element == layer.cells.bytes() && cos.dims[0] == layer.rows &&
              sin.dims == cos.dims,
          "q, kv, cos, sin and cache do not fit together");
  const Matrix w_uk = matrix(uk, call.input(11), 8, layer.nope, layer.rank), w_uv = matrix(uv, call.input(13), 8, layer.rank, layer.v);
  require(uv.dims[0] == layer.heads, "heads of w_uk and w_uv differ");
  float* out = call.output(0, {layer.rows, layer.heads * layer.v}).as<float>();
  layer.cache = call.output(1, cache.dims).as<uint8_t>();
  if (layer.cache != cache.data) std::memcpy(layer.cache, cache.data, cache.size() * element);
  const std::vector<Sequence> sequences = sequences_of(call, layer);
  const Kernels& kernels = ::kernels();

  std::vector<NewRow> rows;
  for (const Sequence& s : sequences)
    for (int64_t r = s.first; r < s.first + s.rows; ++r) rows.push_back({&s, r});
  if (int64_t(rows.size()) < layer.rows) std::fill_n(out, layer.rows * layer.heads * layer.v, 0.0f);
  static thread_local ort::Scratch q_pe_memory;
  float* q_pe = q_pe_memory.of<float>(layer.rows * layer.heads * layer.rope);
  constexpr size_t together = 8;
  const int64_t prepare_tasks = int64_t((rows.size() + together - 1) / together);
  const auto prepare = [&](size_t i) {
    static thread_local ort::Scratch memory;
    float* token = memory.of<float>(layer.width);
    for (size_t k = i * together; k < std::min(rows.size(), (i + 1) * together); ++k) {
      const int64_t row = rows[k].row, pairs = layer.rope / 2;
      const float *c = cos.as<float>() + row * pairs, *s = sin.as<float>() + row * pairs;
      const float* x = kv.as<float>() + row * layer.width;
      normalize(x, norm.as<float>(), layer.rank, epsilon, token);
      rotate(x + layer.rank, c, s, pairs, token + layer.rank);
      layer.cells.write(kernels, token, layer.cell(*rows[k].sequence, rows[k].tokens() - 1));
      for (int64_t h = 0; h < layer.heads; ++h)
        rotate(q.as<float>() + row * q.dims[1] + h * (layer.nope + layer.rope) + layer.nope, c, s, pairs,
               q_pe + (row * layer.heads + h) * layer.rope);
    }
  };

  const bool possible = w_uk.blocks == 1 && layer.nope % 4 == 0 && Expanded::transposed_block(layer.rank);
  std::vector<const Sequence*> expanded;
  std::vector<NewRow> absorbed;
  for (const NewRow& row : rows) {
    const Sequence& s = *row.sequence;
    if (!possible || form == ABSORBED || (form == AUTO && !expanded_is_less(layer, s)))
      absorbed.push_back(row);
    else if (row.row == s.first)
      expanded.push_back(&s);
  }
  if (!expanded.empty()) {
    call.parallel(prepare_tasks, prepare);
    Expanded form(call, kernels, layer, w_uk, w_uv, q.as<float>(), q_pe, softmax_scale, out);
    for (const Sequence* sequence : expanded) form.run(*sequence);
  }
  if (absorbed.empty()) return;

  const int64_t count = int64_t(absorbed.size()), heads = layer.heads;
  static thread_local ort::Scratch q_latent_memory, attended_memory;
  static thread_local Quantized q_memory, latent_memory;
  float* q_latent = q_latent_memory.of<float>(count * heads * layer.rank);
  float* attended = attended_memory.of<float>(count * heads * layer.rank);
  Quantized &q_rows = q_memory, &latents = latent_memory;  // by heads, then rows
  q_rows.prepare(count * heads, w_uk, int(layer.nope));
  latents.prepare(count * heads, w_uv, int(layer.rank));
  Absorbed attention(call, kernels, layer, absorbed, q_latent, q_pe, softmax_scale, attended);
  const auto quantize_q = [&](size_t i) {
    q_rows.fill(i, kernels, [&](int64_t k) {
      return q.as<float>() + absorbed[k % count].row * q.dims[1] + k / count * (layer.nope + layer.rope);
    });
  };
  const auto to_latent = [&](size_t i) {
    const int64_t h = int64_t(i) / chunks(layer.rank), first = int64_t(i) % chunks(layer.rank) * CHUNK;
    store_chunk(kernels, q_rows.rows() + h * count, count, part(w_uk, h), first,
                [&](int64_t r) { return q_latent + (r * heads + h) * layer.rank; });
  };
  const auto query = [&](size_t i) { attention.query_task(i); };
  const auto attend = [&](size_t i) { attention.attend_task(i); };
  const auto merge = [&](size_t i) { attention.merge_task(i); };
  const auto quantize_latents = [&](size_t i) {
    latents.fill(i, kernels, [&](int64_t k) { return attended + (k % count * heads + k / count) * layer.rank; });
  };
  const auto from_latent = [&](size_t i) {
    const int64_t h = int64_t(i) / chunks(layer.v), first = int64_t(i) % chunks(layer.v) * CHUNK;
    store_chunk(kernels, latents.rows() + h * count, count, part(w_uv, h), first,
                [&](int64_t r) { return out + (absorbed[r].row * heads + h) * layer.v; });
  };
  call.run({{expanded.empty() ? prepare_tasks : 0, prepare}, {q_rows.tasks(), quantize_q}, {heads * chunks(layer.rank), to_latent},
            {attention.query_tasks(), query}, {attention.attend_tasks(), attend}, {attention.merge_tasks(), merge}, {latents.tasks(), quantize_latents},
            {heads * chunks(layer.v), from_latent}});
}
