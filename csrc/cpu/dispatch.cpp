#include "dispatch.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace parnet::cpu {

extern const Kernels kernels_portable, kernels_portable16;
#ifdef __x86_64__
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_intel;
#endif

namespace {

struct Compiled {
  const Kernels* kernels;
  bool supported;
  bool automatic;  // chosen if supported, unless a later one is, or the user asks for one
};

// The instruction sets that the kernels are compiled for, best last.
const Compiled* compiled_kernels(int* count) {
#ifdef __x86_64__
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
                    avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"),
                    intel = __builtin_cpu_is("intel");
#endif
  static const Compiled all[] = {
      {&kernels_portable16, true, false},  // for tests
      {&kernels_portable, true, true},
#ifdef __x86_64__
      {&kernels_avx2, avx2, true},
      {&kernels_avx512, avx512, true},
      {&kernels_avx512_intel, avx512, intel},
#endif
  };
  *count = std::size(all);
  return all;
}

const char* override_name() {
  const char* name = std::getenv("PARNET_CPU_ISA");
  return name && *name ? name : nullptr;
}

const Kernels& choose() {
  int count;
  const Compiled* all = compiled_kernels(&count);
  const char* wanted = override_name();
  const Kernels* best = nullptr;
  std::string known;
  for (int i = 0; i < count; i++) {
    if (all[i].supported && all[i].automatic) best = all[i].kernels;
    if (all[i].supported && wanted && std::string(wanted) == all[i].kernels->name) return *all[i].kernels;
    if (all[i].supported) known += std::string(known.empty() ? "" : ", ") + all[i].kernels->name;
  }
  if (wanted) {
    throw std::runtime_error(std::string("PARNET_CPU_ISA must be one of ") + known +
                             " on this processor, got '" + wanted + "'");
  }
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::string describe_isa() {
  int count;
  const Compiled* all = compiled_kernels(&count);
  std::string compiled, supported;
  for (int i = 0; i < count; i++) {
    const std::string name = std::string("\"") + all[i].kernels->name + "\"";
    compiled += (compiled.empty() ? "" : ", ") + name;
    if (all[i].supported) supported += (supported.empty() ? "" : ", ") + name;
  }
  const char* wanted = override_name();
  return std::string("{\"isa\": \"") + kernels().name + "\", \"lanes\": " + std::to_string(kernels().lanes) +
         ", \"compiled\": [" + compiled + "], \"supported\": [" + supported +
         "], \"override\": " + (wanted ? std::string("\"") + wanted + "\"" : "null") + "}";
}

}  // namespace parnet::cpu
