// Which kernels of int8 and bfloat16 networks run.
#include <iterator>
#include <stdexcept>
#include <string>

#include "layer.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace parnet::cpu::direct {

extern const Kernels kernels_portable, kernels_tiles, kernels_bf16_tiles;
#ifdef __x86_64__
extern const Kernels kernels_avx2, kernels_avx_vnni, kernels_avx512_vnni, kernels_amx, kernels_bf16_amx;
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
  bool chosen;  // unless a later one is; others are not worth it
};

#ifdef __x86_64__
// Leaf 7 of CPUID; what GCC's __builtin_cpu_supports does not know.
bool has(int subleaf, int reg, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

// The operating system lets a process use the tiles' registers once it has asked for them.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best last. The order is that of KERNELS in parnet_kernels/cpu/direct.py.
const Level* levels(int64_t* count) {
#ifdef __x86_64__
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"),
                    vnni = avx512 && __builtin_cpu_supports("avx512vnni"),
                    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
                    avx_vnni = avx2 && has(1, 0, 4), tiles = avx512 && has(0, 3, 24) && may_use_tiles(),
                    amx = tiles && has(0, 3, 25), amx_bf16 = tiles && has(0, 3, 22);
#endif
  static const Level all[] = {
      {&kernels_portable, true, false},    {&kernels_tiles, true, false},
      {&kernels_bf16_tiles, true, false},
#ifdef __x86_64__
      {&kernels_avx2, avx2, false},        {&kernels_avx_vnni, avx_vnni, true},
      {&kernels_avx512_vnni, vnni, true},  {&kernels_amx, amx, true},
      {&kernels_bf16_amx, amx_bf16, true},
#endif
  };
  *count = std::size(all);
  return all;
}

}  // namespace

int64_t count() {
  int64_t n;
  levels(&n);
  return n;
}

bool supported(int64_t index) {
  int64_t n;
  const Level* all = levels(&n);
  return index >= 0 && index < n && all[index].supported;
}

const Kernels& kernels(int64_t index) {
  int64_t n;
  const Level* all = levels(&n);
  if (!supported(index)) {
    throw std::runtime_error("kernels number " + std::to_string(index) + " cannot run on this processor");
  }
  return *all[index].kernels;
}

int64_t best(Element element) {
  int64_t n, found = -1;
  const Level* all = levels(&n);
  for (int64_t i = 0; i < n; i++) {
    if (all[i].supported && all[i].chosen && all[i].kernels->element == element) found = i;
  }
  return found;
}

}  // namespace parnet::cpu::direct
