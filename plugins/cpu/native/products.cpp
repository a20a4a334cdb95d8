#include "products.hpp"

#include <algorithm>
#include <cstring>

using ort::Call;
using ort::require;
using ort::Tensor;

Matrix matrix(const Tensor& q, const Tensor& scale, int bits, int64_t inputs, int64_t outputs) {
  require(bits == 8 || bits == 4, "bits must be 8 or 4");
  const size_t n = q.dims.size(), outer = n - 5;
  require(n >= 5 && q.dims[n - 2] == PANEL && q.dims[n - 1] == 4, "weights must lie in panels of 16 outputs");
  std::vector<int64_t> expected(q.dims.begin(), q.dims.begin() + outer + 2);
  expected.push_back(PANEL);
  require(scale.dims == expected, "weights and scales do not fit together");
  const int64_t block = q.dims[n - 3] * 4 * 8 / bits, blocks = q.dims[outer + 1];
  require(block % 8 == 0 && block > 0 && blocks == (inputs + block - 1) / block, "blocks of weights do not fit the inputs");
  const Matrix found{q.as<uint8_t>(), scale.as<float>(), outputs, int(blocks), int(block), bits};
  require(outputs > 0 && found.panels() == q.dims[outer], "panels of weights do not fit the outputs");
  return found;
}

namespace {

// x [..., inputs] as rows.
struct Rows {
  const float* x;
  int64_t count, inputs;
  std::vector<int64_t> dims;

  explicit Rows(const Tensor& tensor) : x(tensor.as<float>()), dims(tensor.dims) {
    require(!dims.empty(), "x must have an axis");
    inputs = dims.back(), count = inputs ? tensor.size() / inputs : 0;
  }
  const float* operator()(int64_t r) const { return x + r * inputs; }
  float* result(const Call& call, size_t index, int64_t outputs) const {
    std::vector<int64_t> shape = dims;
    shape.back() = outputs;
    return call.output(index, shape).as<float>();
  }
};

}  // namespace

void Linear::compute(const Call& call) const {
  const Rows x(call.input(0));
  const Tensor bias = call.input(3);
  const Matrix w = matrix(call.input(1), call.input(2), bits, x.inputs, outputs);
  require(!bias || bias.size() == outputs, "bias does not fit the weights");
  float* y = x.result(call, 0, outputs);
  if (!x.count) return;
  const Kernels& kernels = ::kernels();
  static thread_local Quantized memory;
  Quantized& rows = memory;  // inside a phase a thread's own name would be another thread's other object
  rows.prepare(x.count, w, int(x.inputs));
  const auto quantize = [&](size_t i) { rows.fill(i, kernels, x); };
  const auto product = [&](size_t c) {
    const int64_t first = int64_t(c) * CHUNK, n = std::min<int64_t>(CHUNK, outputs - first);
    const float* out = chunk(kernels, rows.rows(), int(x.count), w, first);
    for (int64_t r = 0; r < x.count; ++r, out += CHUNK) {
      float* to = y + r * outputs + first;
      for (int64_t i = 0; i < n; ++i) to[i] = bias ? out[i] + bias.as<float>()[first + i] : out[i];
    }
  };
  call.run({{rows.tasks(), quantize}, {chunks(outputs), product}});
}

void LinearPair::compute(const Call& call) const {
  const Rows x(call.input(0));
  const Matrix w[2] = {matrix(call.input(1), call.input(2), bits, x.inputs, outputs),
                       matrix(call.input(3), call.input(4), second_bits, x.inputs, second_outputs)};
  float* y[2] = {x.result(call, 0, outputs), x.result(call, 1, second_outputs)};
  if (!x.count) return;
  const Kernels& kernels = ::kernels();
  static thread_local Quantized memory[2];
  Quantized* rows = memory;
  for (int k : {0, 1}) rows[k].prepare(x.count, w[k], int(x.inputs));
  const int64_t tasks = rows[0].tasks(), before = chunks(outputs);
  const auto quantize = [&](size_t i) {
    const bool second = int64_t(i) >= tasks;
    rows[second].fill(second ? i - tasks : i, kernels, x);
  };
  const auto product = [&](size_t c) {
    const int k = int64_t(c) >= before;
    const int64_t first = (int64_t(c) - (k ? before : 0)) * CHUNK;
    store_chunk(kernels, rows[k].rows(), x.count, w[k], first, [&](int64_t r) { return y[k] + r * w[k].outputs; });
  };
  call.run({{tasks + rows[1].tasks(), quantize}, {before + chunks(second_outputs), product}});
}

void GatedMlp::compute(const Call& call) const {
  const Rows x(call.input(0));
  const Matrix gate = matrix(call.input(1), call.input(2), bits, x.inputs, inner);
  const Matrix up = matrix(call.input(3), call.input(4), bits, x.inputs, inner);
  const Matrix down = matrix(call.input(5), call.input(6), down_bits, inner, outputs);
  require(gate.block == up.block, "gate and up have blocks of another size");
  float* y = x.result(call, 0, outputs);
  if (!x.count) return;
  const Kernels& kernels = ::kernels();
  static thread_local Quantized memory, memory_inner;
  static thread_local ort::Scratch inner_memory;
  Quantized &rows = memory, &inner_rows = memory_inner;
  rows.prepare(x.count, gate, int(x.inputs));
  inner_rows.prepare(x.count, down, int(inner));
  float* between = inner_memory.of<float>(x.count * inner);
  const auto quantize = [&](size_t i) { rows.fill(i, kernels, x); };
  const auto gated = [&](size_t c) {
    static thread_local ort::Scratch result;
    const int64_t first = int64_t(c) * CHUNK;
    float* left = result.of<float>(x.count * CHUNK);
    kernels.product(rows.rows(), int(x.count), gate, first, left);
    const float* right = chunk(kernels, rows.rows(), int(x.count), up, first);
    kernels.silu(left, right, int(x.count), int(std::min<int64_t>(CHUNK, inner - first)), between + first, inner);
  };
  const auto quantize_inner = [&](size_t i) { inner_rows.fill(i, kernels, [&](int64_t r) { return between + r * inner; }); };
  const auto product = [&](size_t c) {
    store_chunk(kernels, inner_rows.rows(), x.count, down, int64_t(c) * CHUNK, [&](int64_t r) { return y + r * outputs; });
  };
  call.run({{rows.tasks(), quantize}, {chunks(inner), gated}, {inner_rows.tasks(), quantize_inner}, {chunks(outputs), product}});
}

namespace {

// Which tokens go to which expert, sorted by expert, then by token.
struct Groups {
  std::vector<int64_t> experts;                // those with tokens, in order
  std::vector<int64_t> start;                  // of each of them in `tokens`; one more at the end
  std::vector<int64_t> tokens;
  std::vector<float> weights;

  void sort(const int32_t* ids, const float* given, int64_t count, int64_t top_k, int64_t first, int64_t experts_here) {
    std::vector<int64_t>& at = counts_;
    at.assign(experts_here + 1, 0);
    for (int64_t i = 0; i < count * top_k; ++i)
      if (ids[i] >= first && ids[i] < first + experts_here) ++at[ids[i] - first + 1];
    experts.clear();
    start.assign(1, 0);
    for (int64_t e = 0; e < experts_here; ++e) {
      if (at[e + 1]) experts.push_back(e), start.push_back(start.back() + at[e + 1]);
      at[e + 1] += at[e];
    }
    tokens.resize(start.back());
    weights.resize(start.back());
    for (int64_t i = 0; i < count * top_k; ++i)
      if (ids[i] >= first && ids[i] < first + experts_here) {
        const int64_t place = at[ids[i] - first]++;
        tokens[place] = i / top_k;
        weights[place] = given[i];
      }
  }

 private:
  std::vector<int64_t> counts_;
};

}  // namespace

void Experts::compute(const Call& call) const {
  const Tensor x = call.input(0), ids = call.input(1), given = call.input(2), down_q = call.input(4);
  require(x.dims.size() == 2 && ids.dims.size() == 2 && ids.dims[0] == x.dims[0] && given.dims == ids.dims,
          "x and the choice of experts do not fit together");
  const int64_t count = x.dims[0], hidden = x.dims[1];
  require(down_q.dims.size() == 6 && call.input(3).dims.size() == 6, "experts must lie in panels");
  const int64_t inner_size = down_q.dims[2] * down_q.dims[3] * 4 * 8 / bits;  // blocks of experts are full
  const Matrix gate_up = matrix(call.input(3), call.input(5), bits, hidden, 2 * inner_size);
  const Matrix down = matrix(down_q, call.input(6), bits, inner_size, hidden);
  float* y = call.output(0, {count, hidden}).as<float>();

  static thread_local Groups groups;
  groups.sort(ids.as<int32_t>(), given.as<float>(), count, ids.dims[1], first_expert, down_q.dims[0]);
  const Groups& chosen = groups;  // a thread's own name would be another thread's other object inside parallel
  const int64_t pairs = int64_t(chosen.tokens.size()), active = int64_t(chosen.experts.size());

  const Kernels& kernels = ::kernels();
  static thread_local Quantized memory, memory_inner;
  static thread_local ort::Scratch sorted, inner_memory;
  Quantized &rows = memory, &inner_rows = memory_inner;
  rows.prepare(count, gate_up, int(hidden));
  inner_rows.prepare(pairs, down, int(inner_size));
  Row* by_expert = sorted.of<Row>(pairs);
  for (int64_t p = 0; p < pairs; ++p) by_expert[p] = rows.rows()[chosen.tokens[p]];
  float* inner = inner_memory.of<float>(pairs * inner_size);
  const int64_t each = chunks(gate_up.outputs);
  const auto quantize = [&](size_t i) { rows.fill(i, kernels, [&](int64_t t) { return x.as<float>() + t * hidden; }); };
  const auto gated = [&](size_t i) {
    const int64_t e = int64_t(i) / each, first = int64_t(i) % each * CHUNK, from = chosen.start[e];
    const int n = int(chosen.start[e + 1] - from), outputs = int(std::min<int64_t>(CHUNK, gate_up.outputs - first));
    const float* out = chunk(kernels, by_expert + from, n, part(gate_up, chosen.experts[e]), first);
    kernels.silu_pairs(out, n, outputs / 2, inner + from * inner_size + first / 2, inner_size);
  };
  const auto quantize_inner = [&](size_t i) { inner_rows.fill(i, kernels, [&](int64_t p) { return inner + p * inner_size; }); };
  const auto product = [&](size_t c) {
    const int64_t first = int64_t(c) * CHUNK, n = std::min<int64_t>(CHUNK, hidden - first);
    for (int64_t t = 0; t < count; ++t) std::fill_n(y + t * hidden + first, n, 0.0f);
    for (int64_t e = 0; e < active; ++e) {
      const int64_t from = chosen.start[e], to = chosen.start[e + 1];
      const float* out = chunk(kernels, inner_rows.rows() + from, int(to - from), part(down, chosen.experts[e]), first);
      for (int64_t p = from; p < to; ++p, out += CHUNK) {
        float* sum = y + chosen.tokens[p] * hidden + first;
        for (int64_t i = 0; i < n; ++i) sum[i] += chosen.weights[p] * out[i];
      }
    }
  };
  call.run({{rows.tasks(), quantize}, {active * each, gated}, {inner_rows.tasks(), quantize_inner}, {chunks(hidden), product}});
}
