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
  const int page_size = between(1, 70), rank = between(1, 90), width = rank + between(1, 20), tokens = between(1, 600);
  const int pages = (tokens + page_size - 1) / page_size, split = between(0, (tokens - 1) / SPLIT);
  const bool half = between(0, 1);
  const size_t cells = size_t(pages) * page_size * width;
  Exact<float> cache(half ? 0 : cells), q(size_t(width) * QUERIES), values(size_t(QUERIES) * rank), scratch(scratch_floats(width));
  Exact<uint16_t> small(half ? cells : 0);
  Exact<int32_t> table(pages);
  for (int i = 0; i < pages; ++i) *(table + i) = pages - 1 - i;
  for (size_t i = 0; i < cells; ++i) half ? void(*(small + i) = uint16_t(between(0, 0x3c00))) : void(*(cache + i) = float(between(-9, 9)) / 9);
  for (int i = 0; i < width * QUERIES; ++i) *(q + i) = float(between(-9, 9)) / 9;
  const Keys keys{half ? static_cast<void*>(small + 0) : cache + 0, table + 0, page_size, width, rank, half};
  Partial result{values + 0, {}, {}};
  const int from = split * SPLIT, to = tokens < from + SPLIT ? tokens : from + SPLIT;
  kernels().attend(q + 0, keys, from, to, result, scratch + 0);
  bool finite = true;
  for (int h = 0; h < QUERIES; ++h) finite &= std::isfinite(result.total[h]) && result.total[h] >= 1;
  for (int i = 0; i < QUERIES * rank; ++i) finite &= std::isfinite(*(values + i));
  return finite;
}

int main() {
  for (int i = 0; i < 150; ++i)
    if (!product() || !attend()) return std::printf("%s: case %d is wrong\n", kernels().name, i), 1;
  std::printf("%s: fine\n", kernels().name);
}
