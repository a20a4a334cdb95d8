// What kernels take and give, whatever the processor.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int PANEL = 16;   // outputs whose weights lie together
constexpr int CHUNK = 64;   // outputs of a product that one thread computes at a time; a multiple of PANEL
constexpr int SPLIT = 256;  // cached tokens whose weights are summed before they join a row's others
constexpr int QUERIES = 16; // heads of a row that attend together

// A row of activations, quantized: value = q * scale, one scale a block of inputs; `sum` is that of a block's q.
struct Row {
  const int8_t* q;       // [inputs, padded with zeros to whole blocks], for weights of 4 bits in another order
  const float* scale;    // [blocks]
  const int32_t* sum;    // [blocks]
};

// Weights of `bits` bits, value = (q - zero) * scale with zero = 1 << (bits - 1), in panels of PANEL outputs, the last one filled
// up: [panels][blocks][bytes of a block / 4][PANEL][4]. A byte has two weights of 4 bits, the even input in the low half.
struct Matrix {
  const uint8_t* q;
  const float* scale;    // [panels][blocks][PANEL]
  int64_t outputs;
  int blocks, block, bits;  // block: a multiple of 8
  int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
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
  // For weights of `bits` bits.
  void (*quantize)(const float* x, int inputs, int blocks, int block, int bits, int8_t* q, float* scale, int32_t* sum);
  // out [count][CHUNK]: the products with outputs first .. first + CHUNK (or to the last); first is a multiple of CHUNK.
  void (*product)(const Row* rows, int count, const Matrix& w, int64_t first, float* out);
  // inner[r * stride + i] = silu(out[r][2 i]) * out[r][2 i + 1], i < pairs
  void (*silu_pairs)(const float* out, int count, int pairs, float* inner, int64_t stride);
  // Tokens from .. to (at most SPLIT) of one row's heads; q [width][QUERIES], already scaled. Scratch: scratch_floats.
  void (*attend)(const float* q, const Keys& keys, int from, int to, Partial& result, float* scratch);
  void (*narrow)(const float* x, int count, uint16_t* half);
};

inline size_t scratch_floats(int width) { return size_t(SPLIT) * (QUERIES + width); }

// The fastest kernels that this processor has. LATENTRT_CPU_ISA names others, for tests.
const Kernels& kernels();
