// Products of quantized weights with activations that are quantized here, per row and block of inputs.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.hpp"
#include "op.hpp"

// Rows of activations, quantized, in memory that the calling thread keeps.
class Quantized {
 public:
  // Row r < count is at x(r), [inputs].
  template <class At>
  const Row* rows(const ort::Call& call, const Kernels& kernels, int64_t count, const At& x, const Matrix& w, int inputs) {
    const size_t padded = size_t(w.blocks) * w.block;
    auto* q = q_.of<int8_t>(count * padded);
    auto* scale = scale_.of<float>(count * w.blocks);
    auto* sum = sum_.of<int32_t>(count * w.blocks);
    auto* rows = rows_.of<Row>(count);
    const int64_t together = 1 + 16384 / int64_t(padded);  // fewer elements take less time than another thread's help
    call.parallel((count + together - 1) / together, [&](size_t i) {
      for (int64_t r = i * together; r < count && r < int64_t(i + 1) * together; ++r) {
        rows[r] = Row{q + r * padded, scale + r * w.blocks, sum + r * w.blocks};
        kernels.quantize(x(r), inputs, w.blocks, w.block, w.bits, q + r * padded, scale + r * w.blocks, sum + r * w.blocks);
      }
    });
    return rows;
  }

 private:
  ort::Scratch q_, scale_, sum_, rows_;
};

// Products of one chunk of outputs, in the running thread's memory: [count][CHUNK].
inline float* chunk(const Kernels& kernels, const Row* rows, int count, const Matrix& w, int64_t first) {
  static thread_local ort::Scratch result;
  float* out = result.of<float>(size_t(count) * CHUNK);
  kernels.product(rows, count, w, first, out);
  return out;
}

inline int64_t chunks(int64_t outputs) { return (outputs + CHUNK - 1) / CHUNK; }

// The matrix of q [..., panels, blocks, bytes of a block / 4, PANEL, 4] and scale [..., panels, blocks, PANEL].
Matrix matrix(const ort::Tensor& q, const ort::Tensor& scale, int bits, int64_t inputs, int64_t outputs);

// One of several matrices that lie one after the other.
inline Matrix part(Matrix m, int64_t index) {
  m.q += index * m.panels() * PANEL * m.row_bytes();
  m.scale += index * m.panels() * PANEL * m.blocks;
  return m;
}

// Products of rows with one matrix a head: y(r, h) [outputs] from x(r, h) [inputs].
class HeadProducts {
 public:
  template <class From, class To>
  void run(const ort::Call& call, const Kernels& kernels, int64_t count, const Matrix& all, int64_t heads, int inputs,
           const From& x, const To& y) {
    const Row* rows = memory_.rows(call, kernels, heads * count, [&](int64_t i) { return x(i % count, i / count); }, all, inputs);
    const int64_t each = chunks(all.outputs);
    call.parallel(heads * each, [&](size_t i) {
      const int64_t h = int64_t(i) / each, first = int64_t(i) % each * CHUNK, n = std::min<int64_t>(CHUNK, all.outputs - first);
      const float* out = chunk(kernels, rows + h * count, int(count), part(all, h), first);
      for (int64_t r = 0; r < count; ++r, out += CHUNK) std::memcpy(y(r, h) + first, out, n * sizeof(float));
    });
  }

 private:
  Quantized memory_;
};

// x [..., inputs] with q [panels, blocks, bytes of a block / 4, PANEL, 4] and scale [panels, blocks, PANEL], plus bias
// [outputs] or none. kernels.hpp says what panels are.
struct Linear {
  int bits;
  int64_t outputs;

  explicit Linear(const ort::Attributes& given) : bits(int(given.integer("bits"))), outputs(given.integer("outputs")) {}
  void compute(const ort::Call& call) const;
};

// silu(x gate) * (x up), of two matrices as Linear has them.
struct GatedLinear {
  int bits;
  int64_t outputs;

  explicit GatedLinear(const ort::Attributes& given) : bits(int(given.integer("bits"))), outputs(given.integer("outputs")) {}
  void compute(const ort::Call& call) const;
};

// The contract of plugins/moe_experts/op.py with scales per block and gate_up_layout "interleaved", and with panels: weights
// [experts, panels, blocks, bytes of a block / 4, PANEL, 4], scales [experts, panels, blocks, PANEL].
struct Experts {
  int bits;
  int64_t first_expert;

  explicit Experts(const ort::Attributes& given) : bits(int(given.integer("bits"))), first_expert(given.integer("first_expert")) {
    ort::require(given.text("gate_up_layout") == "interleaved", "MoeExperts takes gate_up_layout interleaved");
  }
  void compute(const ort::Call& call) const;
};
