// The part of ONNX Runtime's C interface that is used here. Its wheel has no headers. The interface is a table of functions
// to which new ones are only ever appended, so that a place in it keeps its meaning: these are the places, not the table.
// `LATEST` is the newest version of the table that any of them needs (KernelContext_ParallelFor, 17; op fields, 18).
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t LATEST = 18;
struct Status;
struct Value;
struct Shape;
struct Context;
struct Info;
struct Domain;
struct Options;
using Table = const void* const*;

struct Base {
  Table (*table)(uint32_t version);
  const char* (*version)();
};

enum Place : int {
  CREATE_STATUS = 0,
  CREATE_DOMAIN = 26,
  ADD_OP = 27,
  ADD_DOMAIN = 28,
  TENSOR_DATA = 51,
  COUNT_DIMS = 61,
  DIMS = 62,
  TENSOR_SHAPE = 65,
  ATTRIBUTE_FLOAT = 85,
  ATTRIBUTE_INT = 86,
  ATTRIBUTE_STRING = 87,
  COUNT_INPUTS = 88,
  INPUT = 90,
  OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_SHAPE = 99,
  PARALLEL_FOR = 274,
};

enum Type : int { FLOAT = 1, UINT8 = 2, INT32 = 6, FLOAT16 = 10 };

// Filled in by an op library; the fields and their order are ONNX Runtime's.
struct Op {
  uint32_t version;
  void* (*create)(const Op*, Table, const Info*);
  const char* (*name)(const Op*);
  const char* (*provider)(const Op*);
  Type (*input_type)(const Op*, size_t);
  size_t (*inputs)(const Op*);
  Type (*output_type)(const Op*, size_t);
  size_t (*outputs)(const Op*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  int (*input_kind)(const Op*, size_t);  // 0 required, 1 optional
  int (*output_kind)(const Op*, size_t);
  int (*input_memory)(const Op*, size_t);
  int (*variadic_inputs)(const Op*);
  int (*inputs_alike)(const Op*);
  int (*variadic_outputs)(const Op*);
  int (*outputs_alike)(const Op*);
  Status* (*create_checked)(const Op*, Table, const Info*, void**);
  Status* (*compute_checked)(void*, Context*);
  Status* (*infer_shapes)(const Op*, void*);
  int (*first_version)(const Op*);
  int (*last_version)(const Op*);
  size_t (*may_reuse)(int**, int**);
  void (*release_reuse)(int*, int*);
  size_t (*aliases)(int**, int**);
  void (*release_aliases)(int*, int*);
};

}  // namespace ort
