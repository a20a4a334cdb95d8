// What kernels take and give, whatever the processor.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int PANEL = 16;   // outputs whose weights lie together
constexpr int CHUNK = 64;   // outputs of a product that one thread computes at a time; a multiple of PANEL
constexpr int SPLIT = 256;  // tokens whose weights are summed before they join a query's others
constexpr int QUERIES = 16; // queries that attend together: heads of one row, or rows of one head

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

// Tokens that QUERIES queries attend to: a row of `width` as a key and a row of `rank` as a value each. Where `seen` is given,
// query i sees the first seen[i] of them only.
struct Tokens {
  const float* const* keys;
  const float* const* values;
  int count, width, rank;
  const int* seen;
  // Where given, it is called before tokens from .. to are used: what it makes is used while it is in the first cache.
  void (*make)(const void* context, int from, int to);
  const void* context;
};

// The softmax-weighted sum over some tokens of QUERIES queries: values [QUERIES][rank] belong to weights exp(score - largest).
struct Partial {
  float* values;
  float largest[QUERIES], total[QUERIES];
};

// How elements of a cached token are stored: whole numbers less half their range, or floats.
enum Coding { INT4, INT6, INT8, E4M3, BF16 };

// Where whole numbers and scales of a token lie in its cell, which begins with the latent's. high: from a plane's beginning on.
struct WholeLayout {
  int rank, rope, group;  // group: elements of the latent that share a scale, a multiple of 32
  Coding latent_coding, rope_coding;
  size_t latent_high, rope_low, rope_high, scales;
};
constexpr int WHOLE_GROUPS = 64;  // most groups of a latent

// QUERIES queries in 16 bits, two elements side by side: [width / 2][QUERIES][2], and what a step is worth for each query.
struct WholeQueries {
  int32_t* pairs;
  float latent_scale[QUERIES], rope_scale[QUERIES];
};

struct WholeTokens {
  const uint8_t* const* cells;
  int count;
  WholeLayout layout;
  // Bytes of memory that attending takes.
  size_t scratch() const {
    const size_t pairs = size_t(count + 1) / 2, groups = size_t(layout.rank / layout.group);
    return 4 * (size_t(count) * (QUERIES + groups + 1) + pairs * size_t(layout.rank + QUERIES)) + 32 * size_t(layout.rank + layout.rope);
  }
};

constexpr double ROUGH = 1e-5;

struct Kernels {
  const char* name;
  // For weights of `bits` bits.
  void (*quantize)(const float* x, int inputs, int blocks, int block, int bits, int8_t* q, float* scale, int32_t* sum);
  // out [count][CHUNK]: the products with outputs first .. first + CHUNK (or to the last); first is a multiple of CHUNK.
  void (*product)(const Row* rows, int count, const Matrix& w, int64_t first, float* out);
  // 8 bits: from panels of `outputs` rows of row_bytes, of which the first `inputs` count, to panels of `inputs` rows of `outputs`.
  // Both are multiples of 4.
  void (*transpose)(const uint8_t* from, int outputs, int inputs, int row_bytes, uint8_t* to);
  // inner[r * stride + i] = silu(out[r][2 i]) * out[r][2 i + 1], i < pairs
  void (*silu_pairs)(const float* out, int count, int pairs, float* inner, int64_t stride);
  // At most SPLIT tokens; q [width][QUERIES], already scaled; scores [count][QUERIES] is scratch memory.
  void (*attend)(const float* q, const Tokens& tokens, Partial& result, float* scores);
  // inner[r * stride + i] = silu(gate[r][i]) * up[r][i], i < outputs
  void (*silu)(const float* gate, const float* up, int count, int outputs, float* inner, int64_t stride);
  void (*widen)(const uint16_t* half, int count, float* x);
  void (*narrow)(const float* x, int count, uint16_t* half);
  // x[e] = scale * element e < count. low: all bits, or the lower four of six, of which `high` has the upper two
  // (plugins/cache_formats/words.py).
  void (*unpack)(Coding coding, const uint8_t* low, const uint8_t* high, int count, float scale, float* x);
  // Whole numbers of 4, 6 or 8 bits; less than 8 are added to zeros. Gives the scale, float16 (integers.py).
  uint16_t (*pack)(const float* x, int count, int bits, uint8_t* low, uint8_t* high);
  float (*pack_e4m3)(const float* x, int count, uint8_t* to);  // gives the scale
  void (*pack_bf16)(const float* x, int count, uint16_t* to);
  // q [width][QUERIES], of which the first `rank` meet latents, into the pairs and scales of `to`.
  void (*round_queries)(const float* q, int rank, int width, WholeQueries& to);
  // At most SPLIT tokens of whole numbers; memory as the tokens say.
  void (*attend_whole)(const WholeQueries& q, const WholeTokens& tokens, Partial& result, void* memory);
  // The largest of x [count], NaN if there is one, and its first place.
  float (*largest_logit)(const float* x, int64_t count, int64_t* place);
  // w = exp((x - top) * factor) [count], which is at most 1; gives the sum.
  double (*weigh)(const float* x, int64_t count, double top, double factor, double* w);
  // The sum alone, wrong by up to ROUGH of it.
  double (*rough_sum)(const float* x, int64_t count, float top, float factor);
  double (*sum)(const double* w, int64_t count);
  // Places of those of x [count] that are not below `floor`, ascending; gives their number.
  int64_t (*logits_from)(const float* x, int64_t count, float floor, int32_t* places);
};

// The fastest kernels that this processor has. LATENTRT_CPU_ISA names others, for tests.
const Kernels& kernels();
