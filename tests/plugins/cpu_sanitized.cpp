// The kernels on random shapes, in memory that ends where the data ends: for builds with -fsanitize=address,undefined.
// Prints a line and returns 0 if many rows at once give the bits that each row gives alone, for every processor.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "kernels.hpp"

static std::mt19937 random_bits(1);
static int between(int low, int high) { return low + int(random_bits() % unsigned(high - low + 1)); }

// Exactly `count` values on the heap.
template <class T>
struct Exact {
  std::unique_ptr<T[]> data;
  explicit Exact(size_t count) : data(new T[count]()) {}
  T* operator+(size_t i) { return data.get() + i; }
};

static bool product() {
  const int blocks[] = {16, 32, 64, 128}, bits = between(0, 1) ? 8 : 4;
  const int block = blocks[between(0, 3)], inputs = between(1, 300), outputs = between(1, 90), rows = between(1, 20);
  const int count = (inputs + block - 1) / block, padded = count * block;
  const int filled = (outputs + PANEL - 1) / PANEL * PANEL;
  Exact<uint8_t> q(size_t(filled) * padded * bits / 8);
  Exact<float> scale(size_t(filled) * count), x(size_t(rows) * inputs), row_scale(rows * count);
  Exact<int8_t> row_q(rows * padded);
  Exact<int32_t> row_sum(rows * count);
  Exact<Row> found(rows);
  for (int i = 0; i < filled * padded * bits / 8; ++i) *(q + i) = uint8_t(random_bits());
  for (int i = 0; i < filled * count; ++i) *(scale + i) = float(between(1, 1000)) / 1e5f;
  for (int i = 0; i < rows * inputs; ++i) *(x + i) = float(between(-1000, 1000)) / 100;
  const Matrix w{q + 0, scale + 0, outputs, count, block, bits};
  const Kernels& kernels = ::kernels();
  for (int r = 0; r < rows; ++r) {
    *(found + r) = Row{row_q + r * padded, row_scale + r * count, row_sum + r * count};
    kernels.quantize(x + r * inputs, inputs, count, block, bits, row_q + r * padded, row_scale + r * count, row_sum + r * count);
  }
  bool equal = true;
  Exact<float> all(rows * CHUNK), one(CHUNK);
  for (int first = 0; first < outputs; first += CHUNK) {
    kernels.product(found + 0, rows, w, first, all + 0);
    for (int r = 0; r < rows; ++r) {
      kernels.product(found + r, 1, w, first, one + 0);
      const int n = outputs - first < CHUNK ? outputs - first : CHUNK;
      equal &= !memcmp(one + 0, all + r * CHUNK, n * sizeof(float));
    }
  }
  return equal;
}

static bool attend() {
  const int rank = between(1, 90), width = between(1, 110), count = between(1, SPLIT);
  const bool masked = between(0, 1);
  Exact<float> keys(size_t(count) * width), values(size_t(count) * rank), q(size_t(width) * QUERIES);
  Exact<float> sums(size_t(QUERIES) * rank), scores(size_t(count) * QUERIES);
  Exact<const float*> key(count), value(count);
  int seen[QUERIES];
  for (int t = 0; t < count; ++t) *(key + t) = keys + t * width, *(value + t) = values + t * rank;
  for (int i = 0; i < count * width; ++i) *(keys + i) = float(between(-9, 9)) / 9;
  for (int i = 0; i < count * rank; ++i) *(values + i) = float(between(-9, 9)) / 9;
  for (int i = 0; i < width * QUERIES; ++i) *(q + i) = float(between(-9, 9)) / 9;
  for (int& n : seen) n = between(1, count);
  Partial result{sums + 0, {}, {}};
  kernels().attend(q + 0, Tokens{key + 0, value + 0, count, width, rank, masked ? seen : nullptr}, result, scores + 0);
  bool right = true;
  for (int h = 0; h < QUERIES; ++h) {
    double total = 0, first = 0;
    for (int t = 0; t < (masked ? seen[h] : count); ++t) {
      double score = 0;
      for (int d = 0; d < width; ++d) score += double(*(q + d * QUERIES + h)) * *(keys + t * width + d);
      total += std::exp(score - result.largest[h]);
      first += std::exp(score - result.largest[h]) * *(values + t * rank);
    }
    right &= std::fabs(total - result.total[h]) < 1e-4 * total && std::fabs(first - *(sums + h * rank)) < 1e-4 * total;
  }
  return right;
}

// A code of 4, 6 or 8 bits into a token's planes, as plugins/cache_formats/words.py lays them out.
static void put(uint8_t* low, uint8_t* high, int bits, int e, int code) {
  if (bits == 8) {
    low[e] = uint8_t(code);
    return;
  }
  low[e / 2] |= uint8_t((code & 15) << (e % 2 * 4));
  if (bits == 6) high[e / 4] |= uint8_t(code >> 4 << (e % 4 * 2));
}

static size_t words(int elements, int bits) { return size_t((elements * bits + 31) / 32) * 4; }
static size_t planes(int elements, int bits) { return bits == 6 ? words(elements, 4) + words(elements, 2) : words(elements, bits); }

static bool attend_whole() {
  const int rank = 32 * between(1, 6), rope = 8 * between(1, 9), count = between(1, SPLIT), width = rank + rope;
  const int bits = between(0, 1) ? 6 : 4, rope_bits = between(0, 1) ? 8 : 6;
  const int group = bits == 6 ? rank : rank % 64 ? 32 : 64, groups = rank / group;
  const size_t latent = planes(rank, bits), pe = planes(rope, rope_bits), size = latent + pe + words(groups + 1, 16);
  const Kernels& kernels = ::kernels();
  Exact<float> q(size_t(width) * QUERIES), real(size_t(count) * width), scale(groups + 1), sums(size_t(QUERIES) * rank);
  Exact<int32_t> pairs(size_t(width / 2) * QUERIES);
  Exact<uint8_t> cells(size * count);
  Exact<const uint8_t*> cell(count);
  for (int i = 0; i < width * QUERIES; ++i) *(q + i) = float(between(-90, 90)) / 900;
  for (int t = 0; t < count; ++t) {
    uint8_t* to = cells + size * t;
    *(cell + t) = to;
    Exact<uint16_t> halves(groups + 1);
    for (int g = 0; g <= groups; ++g) *(scale + g) = float(between(1, 64)) / 1024;  // float16 holds it
    kernels.narrow(scale + 0, groups + 1, halves + 0);
    std::memcpy(to + latent + pe, halves + 0, size_t(groups + 1) * 2);
    for (int e = 0; e < width; ++e) {
      const bool is_latent = e < rank;
      const int n = is_latent ? bits : rope_bits, place = is_latent ? e : e - rank, code = between(0, (1 << n) - 1);
      uint8_t* low = is_latent ? to : to + latent;
      put(low, low + words(is_latent ? rank : rope, 4), n, place, code);
      *(real + size_t(t) * width + e) = float(code - (1 << (n - 1))) * *(scale + (is_latent ? e / group : groups));
    }
  }
  WholeQueries queries{pairs + 0, {}, {}};
  kernels.round_queries(q + 0, rank, width, queries);
  WholeTokens tokens{cell + 0, count, {rank, rope, group, bits == 6 ? INT6 : INT4, rope_bits == 6 ? INT6 : INT8,
                                       words(rank, 4), latent, words(rope, 4), latent + pe}};
  Exact<uint8_t> memory(tokens.scratch());
  Partial result{sums + 0, {}, {}};
  kernels.attend_whole(queries, tokens, result, memory + 0);
  bool right = true;
  for (int h = 0; h < QUERIES; ++h) {
    double total = 0, first = 0, last = 0, largest = 0;
    for (int t = 0; t < count; ++t) {
      const float* x = real + size_t(t) * width;
      double score = 0;
      for (int d = 0; d < width; ++d) score += double(*(q + d * QUERIES + h)) * x[d];
      const double weight = std::exp(score - result.largest[h]);
      total += weight, first += weight * x[0], last += weight * x[rank - 1];
      largest = std::fmax(largest, weight * std::fmax(std::fabs(x[0]), std::fabs(x[rank - 1])));
    }
    const double near = 1e-3 * total * std::fmax(largest, 1e-3);  // 16 bits of queries and weights
    right &= std::fabs(total - result.total[h]) < 1e-3 * total && std::fabs(first - *(sums + size_t(h) * rank)) < near;
    right &= std::fabs(last - *(sums + size_t(h) * rank + rank - 1)) < near;
  }
  return right;
}

extern "C" void latentrt_choose_tokens(const float* logits, int64_t rows, int64_t vocab, const double* numbers,
                                       const int32_t* top_k, int32_t* ids, int32_t* states, float* largest);

static bool choose() {
  const int rows = between(1, 3), vocab = between(1, between(0, 1) ? 70 : 700);
  Exact<float> logits(size_t(rows) * vocab), largest(rows);
  Exact<double> numbers(size_t(rows) * 4);
  Exact<int32_t> top_k(rows), ids(rows), states(rows);
  for (int i = 0; i < rows * vocab; ++i) *(logits + i) = float(between(-90, 90)) / 9;
  for (int r = 0; r < rows; ++r) {
    *(numbers + 4 * r) = double(between(0, 4)) / 2, *(numbers + 4 * r + 1) = between(0, 1) ? 1 : double(between(1, 99)) / 100;
    *(numbers + 4 * r + 2) = between(0, 1) ? 0 : double(between(1, 99)) / 100, *(numbers + 4 * r + 3) = double(between(0, 99)) / 100;
    *(top_k + r) = between(0, 1) ? 0 : between(1, vocab + 1);
  }
  latentrt_choose_tokens(logits + 0, rows, vocab, numbers + 0, top_k + 0, ids + 0, states + 0, largest + 0);
  bool right = true;
  for (int r = 0; r < rows; ++r) right &= *(ids + r) >= 0 && *(ids + r) < vocab && *(logits + size_t(r) * vocab + *(ids + r)) <= *(largest + r);
  return right;
}

int main() {
  for (int i = 0; i < 150; ++i)
    if (!product() || !attend() || !attend_whole() || !choose()) return std::printf("%s: case %d is wrong\n", kernels().name, i), 1;
  std::printf("%s: fine\n", kernels().name);
}
