// What kernels take and give, whatever the processor.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int CHUNK = 32;   // outputs of a product that one thread computes at a time; a multiple of all LANES
constexpr int SPLIT = 256;  // cached tokens whose weights are summed before they join a row's others
constexpr int QUERIES = 16; // heads of a row that attend together

// A row of activations, quantized: value = q * scale, one scale a block of inputs; `sum` is that of a block's q.
struct Row {
  const int8_t* q;       // [inputs, padded with zeros to whole blocks]
  const float* scale;    // [blocks]
  const int32_t* sum;    // [blocks]
};

// Weights [outputs][blocks][block], value = (q - zero) * scale, of BITS bits each with zero 1 << (BITS - 1).
struct Matrix {
  const uint8_t* q;
  const float* scale;    // [outputs][blocks]
  int64_t outputs;
  int blocks, block, bits;
  int64_t row_bytes() const { return int64_t(blocks) * block * bits / 8; }
};

// One sequence's tokens for one new row: they lie on `pages`, in order; cells are float32, or float16 where `half`.
struct Keys {
  const void* cache;     // [pages][page_size][width]
  const int32_t* pages;
  int page_size, width, rank;
  bool half;
};

// The softmax-weighted sum over some tokens of QUERIES queries: values [QUERIES][rank] belong to weights exp(score - largest).
struct Partial {
  float* values;
  float largest[QUERIES], total[QUERIES];
};

struct Kernels {
  const char* name;
  int bytes;  // a block of a matrix must be a multiple of it
  void (*quantize)(const float* x, int inputs, int blocks, int block, int8_t* q, float* scale, int32_t* sum);
  // out [count][CHUNK]: the products with outputs first .. first + CHUNK (or to the last). Scratch: see scratch_bytes.
  void (*product)(const Row* rows, int count, const Matrix& w, int64_t first, float* out, void* scratch);
  // inner[r * stride + i] = silu(out[r][2 i]) * out[r][2 i + 1], i < pairs
  void (*silu_pairs)(const float* out, int count, int pairs, float* inner, int64_t stride);
  // Tokens from .. to (at most SPLIT) of one row's heads; q [width][QUERIES], already scaled. Scratch: scratch_floats.
  void (*attend)(const float* q, const Keys& keys, int from, int to, Partial& result, float* scratch);
  void (*narrow)(const float* x, int count, uint16_t* half);
};

inline size_t scratch_bytes(const Matrix& w) {
  return size_t(CHUNK) * w.blocks * (w.block + sizeof(float));
}

inline size_t scratch_floats(int width) { return size_t(SPLIT) * (QUERIES + width); }

// The fastest kernels that this processor has and that take blocks of this size. LATENTRT_CPU_ISA names others, for tests.
const Kernels& kernels_for(int block);
