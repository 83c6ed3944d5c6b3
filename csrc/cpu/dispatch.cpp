// Which instruction path runs: the one SIREN_CPU_ISA names, else the best this CPU has.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace siren::cpu {

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;  // those that setup.py built

namespace {

struct Path {
  const Kernels* kernels;
  bool supported;
};

}  // namespace

const Kernels& pick_kernels() {
#if defined(SIREN_X86)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  const Path paths[] = {  // best first
#if defined(SIREN_HAVE_AVX512BF16)
      {&kernels_avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
#endif
#if defined(SIREN_HAVE_AVX512)
      {&kernels_avx512, avx512},
#endif
#if defined(SIREN_HAVE_AVX2)
      {&kernels_avx2, avx2},
#endif
      {&kernels_portable, true},
  };
  const char* wanted = std::getenv("SIREN_CPU_ISA");
  std::string known;
  for (const Path& path : paths) {
    if (!wanted || !*wanted) {
      if (path.supported) return *path.kernels;
    } else if (std::string(wanted) == path.kernels->name) {
      if (path.supported) return *path.kernels;
      throw std::invalid_argument(std::string("SIREN_CPU_ISA=") + wanted + ": this CPU lacks those instructions");
    }
    known += std::string(known.empty() ? "" : ", ") + path.kernels->name;
  }
  throw std::invalid_argument(std::string("SIREN_CPU_ISA=") + wanted + " is not an instruction path; this build has " + known);
}

}  // namespace siren::cpu
