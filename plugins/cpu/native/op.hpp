// What an op of this library is written with: tensors, attributes, scratch memory, ONNX Runtime's own threads.
#pragma once
#include <cstdlib>
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

  // f(i) for i < count, in any order, on ONNX Runtime's threads.
  template <class F>
  void parallel(int64_t count, const F& f) const {
    if (count == 1) return f(size_t(0));
    if (count < 1) return;
    void (*one)(void*, size_t) = [](void* data, size_t i) { (*static_cast<const F*>(data))(i); };
    api.call(PARALLEL_FOR, const_cast<const Context*>(context), one, size_t(count), size_t(count),
             const_cast<void*>(static_cast<const void*>(&f)));
  }

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
