// The kernels for each kind of processor, and the choice between them.
#include "kernels.hpp"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define INLINE static inline __attribute__((always_inline))

namespace scalar {
#define NAME "scalar"
#include "vectors_scalar.inc"
#include "kernels.inc"
#undef NAME
}  // namespace scalar

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define NAME "avx2"
#include "vectors_avx2.inc"
#include "kernels.inc"
#undef NAME
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
namespace avxvnni {
#define NAME "avxvnni"
#define AVX_VNNI
#include "vectors_avx2.inc"
#include "kernels.inc"
#undef NAME
}  // namespace avxvnni
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
namespace avx512 {
#define NAME "avx512"
#include "vectors_avx512.inc"
#include "kernels.inc"
#undef NAME
}  // namespace avx512
#pragma GCC pop_options
#endif

static const Kernels* usable(const char* name) {
#if defined(__x86_64__)
  const bool avx2_here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(name, "avx512"))
    return avx2_here && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? &avx512::kernels : nullptr;
  if (!strcmp(name, "avxvnni")) return avx2_here && __builtin_cpu_supports("avxvnni") ? &avxvnni::kernels : nullptr;
  if (!strcmp(name, "avx2")) return avx2_here ? &avx2::kernels : nullptr;
#endif
  return strcmp(name, "scalar") ? nullptr : &scalar::kernels;
}

static const Kernels& chosen() {
  const char* wanted = std::getenv("LATENTRT_CPU_ISA");
  if (wanted) {
    const Kernels* found = usable(wanted);
    return found ? *found : scalar::kernels;
  }
  for (const char* name : {"avx512", "avxvnni", "avx2"})
    if (const Kernels* found = usable(name)) return *found;
  return scalar::kernels;
}

const Kernels& kernels() {
  static const Kernels& found = chosen();
  return found;
}
