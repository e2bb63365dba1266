// The few PTX instructions the kernels need by name.
#pragma once
#include <cstdint>

namespace parnet::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Weights and activations are read through L2 only: no block reads a line twice.
template <int kTo = 0, int kFrom = 0>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(kTo),
               "n"(kFrom)
               : "memory");
}
// Four bytes.
__device__ __forceinline__ void copy_value_async(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
// From 16 * offset bytes after `from`. A predicate that the compiler sees it keeps across the main loop,
// packed with others, which costs more than this comparison.
template <int kTo>
__device__ __forceinline__ void copy_async_unless_negative(uint32_t to, uint64_t from, int offset) {
  asm volatile(
      "{\n"
      ".reg .pred inside;\n"
      ".reg .b64 address;\n"
      "setp.ge.s32 inside, %2, 0;\n"
      "mad.wide.s32 address, %2, 16, %1;\n"
      "@inside cp.async.cg.shared.global [%0 + %3], [address], 16;\n"
      "}" ::"r"(to),
      "l"(from), "r"(offset), "n"(kTo)
      : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Adds for others to acquire. After a barrier of the block it publishes what all of its threads have written:
// the release is cumulative, so no thread needs a fence of its own.
__device__ __forceinline__ void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// The value before; acquires what others have released there, too.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* p, uint32_t v) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}

// Where others use atomics.
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Keeps a value in a register: without it the compiler computes it again at every use inside the main loop.
template <class T>
__device__ __forceinline__ void pin(T& v) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(v));
  } else {
    asm volatile("" : "+r"(v));
  }
}

// Programmatic dependent launch: the next kernel may start, and fetch its weights, once every block of this
// one runs.
__device__ __forceinline__ void allow_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Nothing that another kernel wrote may be read, and nothing written, before this.
__device__ __forceinline__ void wait_for_producers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace parnet::cuda
