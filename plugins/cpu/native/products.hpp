// Products of quantized weights with activations that are quantized here, per row and block of inputs.
#pragma once
#include "kernels.hpp"
#include "op.hpp"

// Rows of activations, quantized, in memory that the calling thread keeps.
class Quantized {
 public:
  // Row r is at x + r * stride, [inputs].
  const Row* rows(const ort::Call& call, const Kernels& kernels, const float* x, int64_t count, int64_t stride,
                  const Matrix& w, int inputs) {
    const size_t padded = size_t(w.blocks) * w.block;
    auto* q = q_.of<int8_t>(count * padded);
    auto* scale = scale_.of<float>(count * w.blocks);
    auto* sum = sum_.of<int32_t>(count * w.blocks);
    auto* rows = rows_.of<Row>(count);
    constexpr int64_t together = 8;
    call.parallel((count + together - 1) / together, [&](size_t i) {
      for (int64_t r = i * together; r < count && r < int64_t(i + 1) * together; ++r) {
        rows[r] = Row{q + r * padded, scale + r * w.blocks, sum + r * w.blocks};
        kernels.quantize(x + r * stride, inputs, w.blocks, w.block, w.bits, q + r * padded, scale + r * w.blocks, sum + r * w.blocks);
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

// x [..., inputs] with q [panels, blocks, bytes of a block / 4, PANEL, 4] and scale [panels, blocks, PANEL], plus bias
// [outputs] or none. kernels.hpp says what panels are.
struct Linear {
  int bits;
  int64_t outputs;

  explicit Linear(const ort::Attributes& given) : bits(int(given.integer("bits"))), outputs(given.integer("outputs")) {}
  void compute(const ort::Call& call) const;
};

// x [T, heads, inputs] with one matrix a head, whose axis comes first in q and scale; [T, heads, outputs].
struct HeadLinear {
  int bits;
  int64_t outputs;

  explicit HeadLinear(const ort::Attributes& given) : bits(int(given.integer("bits"))), outputs(given.integer("outputs")) {}
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
