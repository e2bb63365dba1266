// Thread block clusters by name: two blocks on neighbouring multiprocessors that see each other's shared
// memory.
#pragma once
#include "wgmma.cuh"

namespace parnet::cuda {

// All threads of both blocks: what either did before, the other sees after.
__device__ __forceinline__ void arrive_cluster() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
__device__ __forceinline__ void wait_cluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// Enough after fence_barriers, which orders what it is for.
__device__ __forceinline__ void arrive_cluster_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// Where the other block has what lies at `address` here.
__device__ __forceinline__ uint32_t in_partner(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank ^ 1));
  return there;
}
__device__ __forceinline__ float4 load_partner(uint32_t there) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}
__device__ __forceinline__ float load_partner_value(uint32_t there) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
  return v;
}

// At a barrier of the other block, when products here have read what copies from there will overwrite. The
// plain form, which releases nothing to other blocks: with .release.cluster, and .acquire.cluster in the
// wait, this thread would wait for its own stores and the other block would drop its L1, and no data follow
// these arrivals.
__device__ __forceinline__ void arrive_partner(uint32_t there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

// As copy_bulk, to the same place in both blocks; the barrier in each is told of its copy.
__device__ __forceinline__ void copy_to_both(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}

}  // namespace parnet::cuda
