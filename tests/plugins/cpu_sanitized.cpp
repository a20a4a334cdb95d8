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

int main() {
  for (int i = 0; i < 150; ++i)
    if (!product() || !attend()) return std::printf("%s: case %d is wrong\n", kernels().name, i), 1;
  std::printf("%s: fine\n", kernels().name);
}
