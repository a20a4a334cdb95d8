// What ONNX Runtime calls when it loads the library: the ops, in the domains "latentrt" (those of the step graph) and
// "latentrt.cpu" (those that stand for ONNX Runtime's products).
#include "attention.hpp"
#include "products.hpp"

using namespace ort;

static Status* add(const Api& api, Options* options, const char* name, std::initializer_list<const Op*> ops) {
  try {
    Domain* domain = nullptr;
    api.call(CREATE_DOMAIN, name, &domain);
    for (const Op* op : ops) api.call(ADD_OP, domain, op);
    api.call(ADD_DOMAIN, options, domain);
    return nullptr;
  } catch (const std::exception& error) {
    return api.status(error.what());
  }
}

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(Options* options, const Base* base) {
  const Table table = base->table(LATEST);
  if (!table) return base->table(1) ? Api{base->table(1)}.status("latentrt: ONNX Runtime is too old for own kernels") : nullptr;
  const Api api{table};
  static const OpOf<Linear> linear("Linear", {FLOAT, UINT8, FLOAT, FLOAT}, {FLOAT}, {3});
  static const OpOf<HeadLinear> heads("HeadLinear", {FLOAT, UINT8, FLOAT}, {FLOAT});
  static const OpOf<Experts> experts("Experts", {FLOAT, INT32, FLOAT, UINT8, UINT8, FLOAT, FLOAT}, {FLOAT});
  static const std::vector<Type> plain{FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT32, INT32, INT32, INT32};
  static const std::vector<Type> half{FLOAT, FLOAT, FLOAT, FLOAT, FLOAT16, INT32, INT32, INT32, INT32};
  static const OpOf<Attention> attention("MlaAttention", plain, {FLOAT, FLOAT});
  static const OpOf<Attention> attention_half("MlaAttentionHalf", half, {FLOAT, FLOAT16});
  static const OpOf<Route> route("MoeRoute", {FLOAT, INT32}, {INT32, FLOAT});
  return add(api, options, "latentrt.cpu", {&linear, &heads, &experts, &attention, &attention_half, &route});
}
