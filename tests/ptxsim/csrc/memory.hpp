// Checked access to global, shared and local memory, and the ordering that the checks are made against.
#pragma once
#include "operands.hpp"

namespace ptxsim {

enum AccessFlags : int {
  kRead = 1,
  kWrite = 2,
  kAtomic = 4,
  kStrongAccess = 8,  // volatile, relaxed, acquire or release
  kAsync = 16,        // issues an asynchronous copy
  kUncounted = 32,
  kThroughL1 = 64,     // a weak load that L1 may answer
  kNonCoherent = 128,  // ... even after an acquire (ld.global.nc)
  kAsyncProxy = 256,   // by an asynchronous product or copy
};

// ---- global memory (global_memory.cpp)
// ------------------------------------------------------------------------
Allocation* find_allocation(Machine& m, u64 address);
std::string describe_address(Machine& m, u64 address);
// Checks an access of `size` bytes at each active lane's address; gives host pointers.
void global_access(Context& c, const u64* address, u32 mask, int size, int flags, u8** pointer);
// The same for [address, +bytes) of one lane as one request; `agent` does it.
u8* global_range(Context& c, int lane, u64 address, u32 bytes, int flags, int agent);
void count_global_request(Context& c, const u64* address, u32 mask, int size);

// ---- ordering (ordering.cpp)
// -------------------------------------------------------------------------------- The warp now knows what
// `from` holds.
void absorb(Context& c, const SyncState& from);
// Everything the warp has done and seen becomes visible to whoever joins `into`.
void publish(Context& c, SyncState& into);
void publish_relaxed(Context& c, SyncState& into);  // ... only what a fence of the cluster's scope covers
void fence_gpu(Context& c);
inline void advance_clock(Block& b) { b.cluster->clock++; }
// Effects of a strong access to global memory on ordering. An atomic both reads and writes.
void synchronise(Context& c, const Instruction& in, u64 address, bool reads, bool writes);
// Loads through L1 and acquires, which empty it (l1.cpp).
void check_l1(Context& c, Allocation& a, u64 address, int size, int lane, int flags);
inline void empty_l1(Block& b) { b.l1.clear(); }
void check_global_order(Context& c, Allocation& a, u64 address, int size, int lane, int flags, int agent,
                        bool written_before);

// ---- shared memory (shared_memory.cpp)
// ------------------------------------------------------------------------
// `b` is the block whose shared memory it is, the warp's own or another of its cluster.
void shared_access(Context& c, const u32* address, u32 mask, int size, int flags, u8** pointer);
void check_shared(Context& c, Block& b, int lane, u32 address, int size, int flags, int agent);
void note_shared_write(Block& b, u32 address, int size, int agent, u32 pc);
void count_wavefronts(Context& c, const u32* address, u32 mask, int size);
void check_proxy(Context& c, int lane, u32 address, int size);

// ---- clusters (cluster.cpp)
// ------------------------------------------------------------------------------------
// A shared::cluster address: a byte of a block, and in the bits above it the block's rank + 1. Without the
// latter it is the own block's.
constexpr int kRankShift = 24;
struct SharedPlace {
  Block* block;
  u32 offset;
};
inline int rank_of(const Context& c, u32 address) {  // in the cluster; the own one's without a rank
  u32 field = address >> kRankShift;
  return field >= 1 && field <= c.machine->cluster_blocks ? int(field - 1) : c.block->rank;
}
SharedPlace shared_place(Context& c, int lane, u32 address);
void remote_access(Context& c, const SharedPlace* place, u32 mask, int size, int flags, u8** pointer);
void note_visit(Context& c, Block& b, int agent);
void check_visits(Context& c);  // when the block has exited

// ---- any space (load_store.cpp)
// -------------------------------------------------------------------------------
void resolve(Context& c, Space space, const u64* address, u32 mask, int size, int flags, u8** pointer);

// ---- asynchronous copies and mbarriers
// ------------------------------------------------------------------------
void complete_copies(Context& c, u32 mask, u32 newest_kept, bool all);  // cp_async.cpp
Mbarrier& mbarrier_at(Context& c, Block& b, int lane, u32 address);     // mbarrier.cpp
Mbarrier& use_mbarrier(Context& c, Block& b, int lane, u32 address);    // ... checks that it may be
void mbarrier_try_complete(Context& c, Mbarrier& b);
bool bulk_step(Context& c);                  // bulk_copy.cpp: time passes; true if a copy was completed
void bulk_finish(Context& c, bool exiting);  // all of them
bool bulk_force_one(Context& c);
void bulk_drop_target(Context& c);  // copies of other blocks to this one, which has exited

// ---- atomics (atomics.cpp)
// ------------------------------------------------------------------------------------ The value after `op`.
// flush: subnormals count as zero (f32 additions in global memory).
u64 apply_atomic(Atomic op, Type type, u64 old, u64 operand, u64 other, bool flush_subnormals);

// True if the store that is being executed leaves this byte as it is. `offset` is the byte's place in the
// access.
bool stores_same_byte(const Context& c, int lane, int offset, u8 current);
// What `stmatrix` stores at byte `offset` of the row that `lane` has given the address of.
u8 stmatrix_byte(const Context& c, const Instruction& in, int lane, int offset);

inline VectorClock view_of(const Context& c) {  // what the warp has seen, itself included
  VectorClock v = c.warp->sync.seen;
  v.raise(c.warp->agent, c.block->cluster->clock);
  return v;
}

}  // namespace ptxsim
