// Thread block clusters (sm_90): shared memory of other blocks, the cluster's barrier, multicast. Each BUG
// takes one synchronisation away or makes it too weak; tests name them.
#include <cooperative_groups.h>
#include <cuda.h>

namespace cg = cooperative_groups;

#ifndef BUG
#define BUG 0
#endif
using u32 = unsigned;
using u64 = unsigned long long;

__device__ u32 sptr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ u32 at_rank(u32 address, u32 rank) {
  u32 out;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
  return out;
}
__device__ u32 cluster_rank() { return cg::this_cluster().block_rank(); }
__device__ u32 cluster_size() { return cg::this_cluster().num_blocks(); }
__device__ void init(u64* b, u32 n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sptr(b)), "r"(n) : "memory");
}
__device__ void expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(sptr(b)), "r"(bytes)
               : "memory");
}
#define WAIT(SEMANTICS)                                                  \
  asm volatile("{\n.reg .pred p;\nL: mbarrier.try_wait.parity" SEMANTICS \
               ".shared::cta.b64 p, [%0], %1;\n"                         \
               "@!p bra L;\n}" ::"r"(sptr(b)),                           \
               "r"(parity)                                               \
               : "memory")
__device__ void wait(u64* b, u32 parity) { WAIT(""); }
__device__ void wait_cluster(u64* b, u32 parity) {
#if BUG == 8
  WAIT(".acquire.cta");
#else
  WAIT(".acquire.cluster");
#endif
}
__device__ void arrive_at(u64* b, u32 rank) {
#if BUG == 3
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(at_rank(sptr(b), rank))
               : "memory");
#else
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(at_rank(sptr(b), rank))
               : "memory");
#endif
}
__device__ void multicast(void* to, const void* from, u32 bytes, u64* b, u32 mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(sptr(to)),
      "l"(from), "r"(bytes), "r"(sptr(b)), "h"((unsigned short)mask)
      : "memory");
}
// After the mbarriers were made: a relaxed barrier is enough behind the fence that is made for this.
__device__ void all_initialised() {
#if BUG != 6
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
#if BUG == 5
  __syncthreads();
#else
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ void before_exit() {
#if BUG != 4
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// out[block][17]: the registers that tell where a block is
extern "C" __global__ void where(u32* out) {
  u32 r[17], block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
#define READ(i, name) asm volatile("mov.u32 %0, %" name ";" : "=r"(r[i]))
#define READ3(i, name)    \
  READ(i, name ".x");     \
  READ(i + 1, name ".y"); \
  READ(i + 2, name ".z")
  READ3(0, "%clusterid");
  READ3(3, "%nclusterid");
  READ3(6, "%cluster_ctaid");
  READ3(9, "%cluster_nctaid");
  READ(12, "%cluster_ctarank");
  READ(13, "%cluster_nctarank");
  asm volatile("{.reg .pred p; mov.pred p, %%is_explicit_cluster; selp.u32 %0, 1, 0, p;}" : "=r"(r[14]));
  r[15] = cg::this_cluster().block_rank();
  r[16] = cg::this_cluster().num_blocks();
  for (int i = 0; i < 17; i++) out[17 * block + i] = r[i];
}

// y: the next block's part of x, reversed. The compiler's own code: generic addresses.
extern "C" __global__ void exchange(const int* x, int* y) {
  __shared__ int mine[64];
  cg::cluster_group cluster = cg::this_cluster();
  int t = threadIdx.x, at = 64 * blockIdx.x + t;
  mine[t] = x[at];
#if BUG == 1
  __syncthreads();
#elif BUG == 2
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
#elif BUG == 7
  asm volatile("fence.acq_rel.cluster;\nbarrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
#else
  cluster.sync();
#endif
  y[at] = cluster.map_shared_rank(mine, (cluster.block_rank() + 1) % cluster.num_blocks())[63 - t];
#if BUG != 4
  cluster.sync();
#endif
}

// How often each value is in the cluster's part of x: the bins lie in all of its blocks.
extern "C" __global__ void histogram(const u32* x, u32* y, int n) {
  __shared__ u32 bins[32];
  u32 size = cluster_size(), first = blockIdx.x / size * n, t = threadIdx.x;
  if (t < 32) bins[t] = 0;
  cg::this_cluster().sync();
  for (u32 i = cluster_rank() * 64 + t; i < n; i += 64 * size) {
    u32 value = x[first + i];
#if BUG == 1
    u32* bin = cg::this_cluster().map_shared_rank(bins, value % size) + value / size;
    *bin = *bin + 1;
#else
    atomicAdd(cg::this_cluster().map_shared_rank(bins, value % size) + value / size, 1);
#endif
  }
  cg::this_cluster().sync();
  if (t < 32) y[32 * blockIdx.x + t] = bins[t];
}

// Tiles of a pipeline of two stages: every block loads its slice of 32 and sends it to all of them;
// y[block][t] is the sum over tiles and slices of slice[t % 32] * (t / 32 + 1). Warp 0 produces, warps 1 and
// 2 consume.
extern "C" __global__ void pipeline(const int* x, int* y, int tiles) {
  extern __shared__ __align__(128) int buffer[];  // [2][size][32]
  __shared__ u64 full[2], empty[2];
  u32 size = cluster_size(), rank = cluster_rank(), t = threadIdx.x, warp = t / 32;
  if (t == 0) {
    for (int s = 0; s < 2; s++) {
      init(full + s, 1);
#if BUG == 2
      init(empty + s, 2);
#else
      init(empty + s, 2 * size);
#endif
    }
  }
  all_initialised();
  x += blockIdx.x / size * tiles * size * 32;
  if (warp == 0) {
    if (t == 0)
      for (int k = 0; k < tiles; k++) {
        int s = k & 1;
#if BUG != 1
        wait_cluster(empty + s, (k >> 1 & 1) ^ 1);
#endif
        expect(full + s, size * 128);
        multicast(buffer + (s * size + rank) * 32, x + (k * size + rank) * 32, 128, full + s,
                  (1u << size) - 1);
      }
  } else {
    int sum = 0;
    for (int k = 0; k < tiles; k++) {
      int s = k & 1;
#if BUG != 7
      wait(full + s, k >> 1 & 1);
#endif
      for (int r = 0; r < size; r++) sum += buffer[(s * size + r) * 32 + t % 32] * (int)warp;
      __syncwarp();
#if BUG == 2
      if (t % 32 == 0) arrive_at(empty + s, rank);
#else
      if (t % 32 < size) arrive_at(empty + s, t % 32);
#endif
    }
    y[64 * blockIdx.x + t - 32] = sum;
  }
  before_exit();
}

// Block r of a cluster loads rows 8 r to 8 r + 7 of the tile of 32 columns for all; each block writes the
// whole tile.
extern "C" __global__ void tensor_multicast(const __grid_constant__ CUtensorMap map, float* y) {
  extern __shared__ __align__(128) float tile[];
  __shared__ u64 full;
  u32 size = cluster_size(), rank = cluster_rank(), t = threadIdx.x;
  if (t == 0) init(&full, 1);
  all_initialised();
  if (t == 0) {
    expect(&full, size * 8 * 32 * 4);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, "
        "{%3, %4}], [%2], %5;" ::"r"(sptr(tile + rank * 8 * 32)),
        "l"(&map), "r"(sptr(&full)), "r"(32 * (blockIdx.x / size)), "r"(8 * rank),
        "h"((unsigned short)((1u << size) - 1))
        : "memory");
  }
  wait(&full, 0);
  for (u32 i = t; i < size * 8 * 32; i += blockDim.x) y[blockIdx.x * size * 8 * 32 + i] = tile[i];
  before_exit();
}

// Every block sends 64 numbers from its shared memory to the next block's.
extern "C" __global__ void push(const int* x, int* y) {
  __shared__ __align__(16) int out[64], in[64];
  __shared__ u64 full;
  u32 next = (cluster_rank() + 1) % cluster_size(), t = threadIdx.x;
  if (t == 0) init(&full, 1);
  out[t] = x[64 * blockIdx.x + t];
#if BUG != 1
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  all_initialised();
  __syncthreads();
  if (t == 0) {
    expect(&full, 256);
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(
            at_rank(sptr(in), next)),
        "r"(sptr(out)), "r"(BUG == 2 ? sptr(&full) : at_rank(sptr(&full), next))
        : "memory");
  }
#if BUG != 3
  wait(&full, 0);
#endif
  y[64 * blockIdx.x + t] = in[t];
  before_exit();
}

// The last block of a cluster reads from the first one.
extern "C" __global__ void peek(int* y) {
  __shared__ int mine[32];
  u32 t = threadIdx.x, size = cluster_size();
  mine[t] = t;
  cg::this_cluster().sync();
  if (cluster_rank() == size - 1) y[t] = cg::this_cluster().map_shared_rank(mine, 0)[t];
  before_exit();
}

// The second block of a cluster reads what the first has written to global memory.
extern "C" __global__ void through_global(int* x, int* y) {
  if (cluster_rank() == 0) x[threadIdx.x] = threadIdx.x;
#if BUG != 1
  cg::this_cluster().sync();
#endif
  if (cluster_rank() == 1) y[threadIdx.x] = x[threadIdx.x];
}
