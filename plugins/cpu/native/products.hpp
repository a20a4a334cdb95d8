// Products of quantized weights with activations that are quantized here, per row and block of inputs.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.hpp"
#include "op.hpp"

// Rows of activations for the products of a matrix, quantized by the tasks of a phase, in memory that is used again.
class Quantized {
 public:
  void prepare(int64_t count, const Matrix& w, int inputs) {
    count_ = count, inputs_ = inputs, w_ = w;
    const size_t padded = size_t(w.blocks) * w.block;
    q_ = q_memory_.of<int8_t>(count * padded);
    scale_ = scale_memory_.of<float>(count * w.blocks);
    sum_ = sum_memory_.of<int32_t>(count * w.blocks);
    rows_ = rows_memory_.of<Row>(count);
    together_ = 1 + 4096 / int64_t(padded);
    for (int64_t r = 0; r < count; ++r) rows_[r] = Row{q_ + r * padded, scale_ + r * w.blocks, sum_ + r * w.blocks};
  }
  const Row* rows() const { return rows_; }
  int64_t tasks() const { return (count_ + together_ - 1) / together_; }

  // Row r is at x(r), [inputs].
  template <class At>
  void fill(size_t task, const Kernels& kernels, const At& x) const {
    const int64_t padded = int64_t(w_.blocks) * w_.block;
    for (int64_t r = task * together_; r < std::min<int64_t>(count_, (task + 1) * together_); ++r)
      kernels.quantize(x(r), inputs_, w_.blocks, w_.block, w_.bits, q_ + r * padded, scale_ + r * w_.blocks, sum_ + r * w_.blocks);
  }

 private:
  ort::Scratch q_memory_, scale_memory_, sum_memory_, rows_memory_;
  Matrix w_{};
  int64_t count_ = 0, together_ = 1;
  int inputs_ = 0;
  int8_t* q_ = nullptr;
  float* scale_ = nullptr;
  int32_t* sum_ = nullptr;
  Row* rows_ = nullptr;
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

// Writes the products of rows with outputs first .. first + CHUNK (or to the last) to y(r) + first.
template <class To>
void store_chunk(const Kernels& kernels, const Row* rows, int64_t count, const Matrix& w, int64_t first, const To& y) {
  const int64_t n = std::min<int64_t>(CHUNK, w.outputs - first);
  const float* out = chunk(kernels, rows, int(count), w, first);
  for (int64_t r = 0; r < count; ++r, out += CHUNK) std::memcpy(y(r) + first, out, n * sizeof(float));
}

// x [..., inputs] with q [panels, blocks, bytes of a block / 4, PANEL, 4] and scale [panels, blocks, PANEL], plus bias
// [outputs] or none. kernels.hpp says what panels are.
struct Linear {
  int bits;
  int64_t outputs;

  explicit Linear(const ort::Attributes& given) : bits(int(given.integer("bits"))), outputs(given.integer("outputs")) {}
  void compute(const ort::Call& call) const;
};

// Two products of the same x, without bias.
struct LinearPair {
  int bits, second_bits;
  int64_t outputs, second_outputs;

  explicit LinearPair(const ort::Attributes& given)
      : bits(int(given.integer("bits"))), second_bits(int(given.integer("second_bits"))), outputs(given.integer("outputs")),
        second_outputs(given.integer("second_outputs")) {}
  void compute(const ort::Call& call) const;
};

// A gated MLP: (silu(x gate) * (x up)) down, of matrices as Linear has them.
struct GatedMlp {
  int bits, down_bits;
  int64_t inner, outputs;

  explicit GatedMlp(const ort::Attributes& given)
      : bits(int(given.integer("bits"))), down_bits(int(given.integer("down_bits"))), inner(given.integer("inner")),
        outputs(given.integer("outputs")) {}
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
