// What an op of this library is written with: tensors, attributes, scratch memory, ONNX Runtime's own threads.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.hpp"

namespace ort {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("latentrt: " + what); }
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

// The function at a place of the table.
struct Api {
  Table table;

  template <class... Args>
  void call(Place place, Args... args) const {
    if (Status* status = reinterpret_cast<Status* (*)(Args...)>(const_cast<void*>(table[place]))(args...)) {
      reinterpret_cast<void (*)(Status*)>(const_cast<void*>(table[RELEASE_STATUS]))(status);
      fail("ONNX Runtime refused call " + std::to_string(place));
    }
  }
  Status* status(const char* message) const {
    return reinterpret_cast<Status* (*)(int, const char*)>(const_cast<void*>(table[CREATE_STATUS]))(1, message);
  }
};

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> dims;

  explicit operator bool() const { return data || !dims.empty(); }
  template <class T>
  T* as() const { return static_cast<T*>(data); }
  int64_t size() const {
    int64_t n = 1;
    for (int64_t d : dims) n *= d;
    return n;
  }
};

// f(i) for i < count, in any order, by any thread. Keeps no copy of f.
struct Phase {
  int64_t count;
  const void* f;
  void (*call)(const void* f, size_t i);

  template <class F>
  Phase(int64_t count, const F& f) : count(count), f(&f), call([](const void* f, size_t i) { (*static_cast<const F*>(f))(i); }) {}
};

// Work that all threads which come share, phase by phase: a thread takes what is left of a phase, and goes on when all of it is
// done. Whoever waits, waits for a thread that runs, so that it does not matter how many come, and when.
class Shared {
 public:
  static constexpr size_t MOST = 8;

  Shared(const Phase* phases, size_t count) : phases_(phases), count_(count) {}

  void work() {
    for (size_t p = 0; p < count_; ++p) {
      const int64_t all = phases_[p].count;
      int64_t mine = 0;
      for (int64_t i; (i = next_[p].fetch_add(1, std::memory_order_relaxed)) < all; ++mine) phases_[p].call(phases_[p].f, size_t(i));
      if (mine) done_[p].fetch_add(mine, std::memory_order_acq_rel);
      for (int spins = 0; done_[p].load(std::memory_order_acquire) < all; ++spins) {
        if (failed_.load(std::memory_order_relaxed)) return;
        pause(spins);
      }
    }
  }
  // The same, for ONNX Runtime's threads, which take no exceptions: the first one is kept.
  void work_or_fail() {
    try {
      work();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static void pause(int spins) {
    if (spins > 1 << 12) return void(sched_yield());
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const Phase* phases_;
  size_t count_;
  std::atomic<int64_t> next_[MOST] = {}, done_[MOST] = {};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// Cores that this process may use.
inline int64_t cores() {
  static const int64_t found = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 64 : CPU_COUNT(&set);
  }();
  return found;
}

struct Call {
  Api api;
  Context* context;

  Tensor input(size_t index) const {
    size_t count = 0;
    api.call(COUNT_INPUTS, const_cast<const Context*>(context), &count);
    const Value* value = nullptr;
    if (index < count) api.call(INPUT, const_cast<const Context*>(context), index, &value);
    return value ? tensor(const_cast<Value*>(value)) : Tensor{};
  }
  Tensor output(size_t index, const std::vector<int64_t>& dims) const {
    Value* value = nullptr;
    api.call(OUTPUT, context, index, dims.data(), dims.size(), &value);
    Tensor found{nullptr, dims};
    api.call(TENSOR_DATA, value, &found.data);
    return found;
  }

  // Phases one after the other on ONNX Runtime's threads, which are asked once.
  void run(std::initializer_list<Phase> phases) const {
    require(phases.size() <= Shared::MOST, "too many phases");
    int64_t most = 0;
    for (const Phase& phase : phases) most = std::max(most, phase.count);
    Shared shared(phases.begin(), phases.size());
    if (most <= 1) return shared.work();
    void (*join)(void*, size_t) = [](void* data, size_t) { static_cast<Shared*>(data)->work_or_fail(); };
    const size_t threads = size_t(std::min(most, cores()));
    api.call(PARALLEL_FOR, const_cast<const Context*>(context), join, threads, threads, static_cast<void*>(&shared));
    shared.rethrow();
  }
  // f(i) for i < count.
  template <class F>
  void parallel(int64_t count, const F& f) const { run({Phase(count, f)}); }

 private:
  Tensor tensor(Value* value) const {
    Tensor found;
    api.call(TENSOR_DATA, value, &found.data);
    Shape* shape = nullptr;
    api.call(TENSOR_SHAPE, const_cast<const Value*>(value), &shape);
    size_t rank = 0;
    api.call(COUNT_DIMS, const_cast<const Shape*>(shape), &rank);
    found.dims.resize(rank);
    api.call(DIMS, const_cast<const Shape*>(shape), found.dims.data(), rank);
    reinterpret_cast<void (*)(Shape*)>(const_cast<void*>(api.table[RELEASE_SHAPE]))(shape);
    return found;
  }
};

struct Attributes {
  Api api;
  const Info* info;

  int64_t integer(const char* name) const {
    int64_t value = 0;
    api.call(ATTRIBUTE_INT, info, name, &value);
    return value;
  }
  float real(const char* name) const {
    float value = 0;
    api.call(ATTRIBUTE_FLOAT, info, name, &value);
    return value;
  }
  std::string text(const char* name) const {
    char found[64];
    size_t size = sizeof found;
    api.call(ATTRIBUTE_STRING, info, name, static_cast<char*>(found), &size);
    return found;
  }
};

// Memory that a thread keeps for one purpose from call to call, so that steps allocate nothing once they have been as
// large before. Aligned for vectors.
class Scratch {
 public:
  void* bytes(size_t size) {
    if (size > size_) {
      memory_.reset();
      size_ = 0;
      const size_t rounded = (size + size / 4 + 127) / 64 * 64;
      memory_.reset(std::aligned_alloc(64, rounded));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }
  template <class T>
  T* of(size_t count) { return static_cast<T*>(bytes(count * sizeof(T))); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// An op with kernel class K, which has a constructor from Attributes and `void compute(const Call&) const`.
template <class K>
struct OpOf : Op {
  const char* op_name;
  std::vector<Type> input_types, output_types;
  std::vector<int> optional;

  struct Kernel {
    Api api;
    K kernel;
  };

  OpOf(const char* op_name, std::vector<Type> inputs_, std::vector<Type> outputs_, std::vector<int> optional_ = {})
      : Op{}, op_name(op_name), input_types(inputs_), output_types(outputs_), optional(optional_) {
    version = LATEST;
    name = [](const Op* op) { return self(op).op_name; };
    provider = [](const Op*) -> const char* { return nullptr; };
    input_type = [](const Op* op, size_t i) { return self(op).input_types[i]; };
    inputs = [](const Op* op) { return self(op).input_types.size(); };
    output_type = [](const Op* op, size_t i) { return self(op).output_types[i]; };
    outputs = [](const Op* op) { return self(op).output_types.size(); };
    input_kind = [](const Op* op, size_t i) {
      for (int k : self(op).optional)
        if (size_t(k) == i) return 1;
      return 0;
    };
    output_kind = [](const Op*, size_t) { return 0; };
    input_memory = [](const Op*, size_t) { return 0; };
    variadic_inputs = inputs_alike = variadic_outputs = outputs_alike = [](const Op*) { return 1; };
    first_version = [](const Op*) { return 1; };
    last_version = [](const Op*) { return 1 << 30; };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    create_checked = [](const Op*, Table table, const Info* info, void** made) -> Status* {
      const Api api{table};
      try {
        *made = new Kernel{api, K(Attributes{api, info})};
        return nullptr;
      } catch (const std::exception& error) {
        return api.status(error.what());
      }
    };
    compute_checked = [](void* kernel, Context* context) -> Status* {
      const Kernel& found = *static_cast<Kernel*>(kernel);
      try {
        found.kernel.compute(Call{found.api, context});
        return nullptr;
      } catch (const std::exception& error) {
        return found.api.status(error.what());
      }
    };
  }

  static const OpOf& self(const Op* op) { return *static_cast<const OpOf*>(op); }
};

}  // namespace ort
