// What ONNX Runtime calls when it loads the library: the ops, in the domain "latentrt.cpu".
#include "mla.hpp"
#include "products.hpp"
#include "route.hpp"

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
  static const OpOf<LinearPair> pair("LinearPair", {FLOAT, UINT8, FLOAT, UINT8, FLOAT}, {FLOAT, FLOAT});
  static const OpOf<GatedMlp> gated("GatedMlp", {FLOAT, UINT8, FLOAT, UINT8, FLOAT, UINT8, FLOAT}, {FLOAT});
  static const OpOf<Experts> experts("Experts", {FLOAT, INT32, FLOAT, UINT8, UINT8, FLOAT, FLOAT}, {FLOAT});
  static const std::vector<Type> plain{FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT32, INT32, INT32, INT32, UINT8, FLOAT, UINT8, FLOAT};
  static const auto of_cache = [](Type type) {
    std::vector<Type> types = plain;
    types[5] = type;
    return types;
  };
  static const OpOf<Mla> mla("Mla", plain, {FLOAT, FLOAT});
  static const OpOf<Mla> mla_half("MlaHalf", of_cache(FLOAT16), {FLOAT, FLOAT16});
  static const OpOf<Mla> mla_packed("MlaPacked", of_cache(INT32), {FLOAT, INT32});
  static const OpOf<Route> route("MoeRoute", {FLOAT, INT32}, {INT32, FLOAT});
  return add(api, options, "latentrt.cpu", {&linear, &pair, &gated, &experts, &mla, &mla_half, &mla_packed, &route});
}
