// The state of a simulated launch: clusters, blocks, warps, reports.
#pragma once
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "clock.hpp"
#include "instruction.hpp"

namespace ptxsim {

struct Context;
using Handler = void (*)(Context&, const Instruction&);

constexpr u64 kSharedWindow = 0x0001000000000000ull;  // where shared memory lies in generic addresses
constexpr u64 kLocalWindow = 0x0002000000000000ull;
constexpr int kConstantBytes = 384;  // a constant: 32 lanes of 32 bits, then 32 lanes of 64 bits
constexpr int kMaxClusterBlocks = 16;

struct WriteRecord {
  u32 cluster, stamp, pc;
  u16 agent;
  bool strong;
  u64 time;  // Machine::instructions at its last store
};

// ---- warps and blocks
// --------------------------------------------------------------------------------------
enum class GroupState : u8 { Running, AtBarrier, AtWarpSync };

// Lanes of a warp that are at the same instruction.
struct Group {
  u32 pc, mask;
  GroupState state = GroupState::Running;
  u32 needed = 0;             // AtWarpSync: lanes that must come
  int barrier = 0;            // AtBarrier: its number
  bool warp_barrier = false;  // AtWarpSync: at bar.warp.sync
};

struct CpAsyncCopy {
  u32 mask, pc;
  int size;
  u32 dst[32], group[32];
  u8 data[32][16];
};

struct WgmmaCall {
  u32 pc, group;
  bool scale_d;
  u64 desc_a, desc_b;
};

// Round trips to global memory that must have ended, one after the other, before something can happen.
struct RoundTrips {
  std::vector<u16> ready;  // before each register holds its value; by its offset / 4
  u32 now = 0;             // before the next instruction, since instructions are issued in order
  u32 stores = 0;          // before all stores are done
  u32 copies = 0;          // before the cp.async of the open group are
  std::vector<u32> groups;
  u32 first_product = 0, last_product = 0;  // at the first and the last matrix instruction
  bool multiplied = false;
  u32 polled = ~0u;  // the last strong load: a loop of them counts as one
};

struct Warp {
  int id;     // in its block
  int agent;  // in its cluster
  u8* regs = nullptr;
  u8* local = nullptr;
  u32 live = 0;
  std::vector<Group> groups;
  std::vector<u32> call_stack[32];
  SyncState sync;
  std::vector<CpAsyncCopy> copies;
  u32 copy_groups[32] = {};  // groups committed by each lane
  std::vector<WgmmaCall> wgmma;
  u32 wgmma_groups = 0;
  u32 bulk_groups[32] = {};
  std::vector<std::pair<u32, u32>> records;  // per store instruction of late: (pc, record number)
  size_t recent_record = 0;
  RoundTrips trips;
  u32 cluster_arrived = 0, cluster_parity = 0;  // lanes that must wait at the cluster's barrier; their phase
  bool yielding = false;                        // it polls: let others run
  bool spinning = false;                        // diverged and polling: let another group of its lanes run
};

struct Mbarrier {
  u32 expected = 0, pending = 0, phase = 0;
  s64 tx = 0;
  SyncState arriving, completed;
  std::optional<SyncState> arriving_remote, completed_remote;  // of other blocks' threads
  int init_agent = 0;
  u32 init_stamp = 0;
  bool init_fenced = false;  // fence.mbarrier_init has followed
};

struct Barrier {
  bool used = false;
  u32 lanes = 0, warps = 0, expected = 0, predicates = 0;  // expected 0: the whole block
  u32 trips = 0;                                           // the most of those who arrived
  std::array<u32, kMaxWarps> lane_mask{};
  SyncState arriving;
};

constexpr int kBarriers = 16;
constexpr int kClusterBarrier = kBarriers;  // Group::barrier at barrier.cluster.wait

struct Block;
struct Cluster;

// A bulk or tensor copy that was issued and has not happened yet. A multicast is one for each block.
struct BulkCopy {
  Warp* warp;
  Block* target;  // of a load: whose shared memory and mbarrier
  u32 pc, lane, smem, bytes, mbar;
  u32 group;  // of a store: which of the thread's bulk groups
  u32 stamp, delay;
  u64 global;  // address of the data (from_shared: in shared memory) or of the tensor map
  s32 coord[5];
  bool load, tensor, from_shared, done, read_waited;
};

// An agent of another block that has accessed this block's shared memory
struct Visitor {
  u32 stamp = 0, pc = 0;
  std::vector<u32> reads;  // stamp of its last read of each byte
};

struct Block {
  u32 id[3];
  u32 number;  // linear
  Cluster* cluster = nullptr;
  int rank = 0, first_agent = 0;  // in the cluster
  int n_warps, n_threads;
  u32 live = 0;
  u8* smem = nullptr;
  // Shadow of shared memory, one entry a byte
  u8 *initialised = nullptr, *in_flight = nullptr;
  u8* plainly_read = nullptr;  // by an instruction of the generic proxy, since it was written
  u16* writer = nullptr;       // agent, kStrongWriter if strong
  u32 *write_stamp = nullptr, *write_pc = nullptr, *read_pc = nullptr;
  u32* read_stamp = nullptr;                          // [agent of this block][byte]
  u32 *chunk_write = nullptr, *chunk_read = nullptr;  // newest stamp of each 16 bytes
  std::map<int, Visitor> visitors;                    // by agent
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::map<u32, Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk;
  bool bulk_used = false;
  u32 unreleased_pc = ~0u;  // last atomic on global memory that published nothing, for the text of reports
  u64 polls = 0;
  // Lines of global memory that the block's loads have brought into L1: when (Machine::instructions), and
  // whether before griddepcontrol.wait. Nothing is evicted; an acquire empties the first.
  std::unordered_map<u64, std::pair<u64, bool>> l1, non_coherent;

  int bulk_agent() const { return first_agent + n_warps; }
  int bulk_global_agent() const { return first_agent + n_warps + 1; }
  int agents() const { return n_warps + 2; }
  int shared_agents() const { return n_warps + (bulk_used ? 1 : 0); }
  bool owns(int agent) const { return agent >= first_agent && agent < first_agent + agents(); }
  bool is_engine(int agent) const { return agent % agents() >= n_warps; }
};

struct Cluster {
  u32 number;                  // linear
  std::vector<Block*> blocks;  // by rank
  u32 clock = 1;
  // barrier.cluster: threads that live and have not arrived in this phase
  u32 missing = 0, phase = 0;
  u32 trips = 0;
  SyncState arriving, completed;

  u32 live() const {
    u32 threads = 0;
    for (const Block* b : blocks) threads += b->live;
    return threads;
  }
};

// ---- results
// -----------------------------------------------------------------------------------------------
// clang-format off
#define PTXSIM_REPORT_KINDS(X) \
  X(UninitShared, "uninit-shared") X(UninitGlobal, "uninit-global") X(Race, "race") \
  X(GlobalRace, "global-race") X(AsyncHazard, "async-hazard") X(Proxy, "missing-proxy-fence") \
  X(Barrier, "barrier") X(WarpSync, "warp-sync") X(BeforeWait, "before-wait") X(StaleL1, "stale-l1")
// clang-format on

enum class ReportKind : int {
#define X(name, text) name,
  PTXSIM_REPORT_KINDS(X)
#undef X
};

struct Report {
  ReportKind kind;
  u32 pc, block[3], thread[3];
  u64 count;
  std::string message;
};

// Counters of one instruction
struct Counters {
  u64 executed, lanes, requests, sectors, bytes, wavefronts, ideal_wavefronts;
  u64 delivered;  // bulk copies: bytes of shared memory, in all blocks that a multicast reaches
};

enum AllocationKind : s32 { kReadWrite = 0, kConstant = 1, kParameter = 2 };

// Addresses here are integers so that the layout can be a numpy record.
struct Allocation {
  u64 base, size, host;
  u64 shadow;   // one byte a byte: shadow bits below
  u64 writes;   // u32 a byte: number of the newest WriteRecord, or 0
  u64 readers;  // ReadRecord for each 16 bytes; 0: no race checks
  s32 kind, id;
};
// kPending: written by launches that may go on until griddepcontrol.wait returns
enum : u8 { kUninitialised = 1, kWasRead = 2, kWasWritten = 4, kPending = 8 };

struct Reader {
  u32 cluster1, stamp, pc;  // cluster1: cluster number + 1; 0: nobody
  u16 bytes;                // which of the 16
  u16 agent;
};
struct ReadRecord {
  Reader last, before;  // two different readers
};

// Any fault stops the launch.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class L2Model;

struct Machine {
  // The program
  std::vector<Instruction> program;
  std::vector<Handler> handlers;
  std::vector<u8> classes;
  std::vector<s32> operands;
  std::vector<u8> constants;
  const u8* aligned_constants = nullptr;
  std::vector<std::pair<s32, s32>> special_registers;  // (which, register offset)
  u32 register_bytes = 0, local_bytes = 0, entry = 0;

  // The launch
  u32 grid[3], block_dim[3], shared_bytes = 0;
  u32 cluster_dim[3], cluster_blocks = 1;
  bool explicit_cluster = false;
  bool clustered = false;  // several blocks, or a barrier of the cluster
  std::vector<Allocation> allocations;
  size_t last_allocation = 0;
  bool races = true, strict = false;
  bool count_trips = false;
  bool dependent = false;  // launched beside the end of the launches before it
  u32 seed = 0;
  double approx_error = 0;
  u64 max_instructions = 0;
  u32 random_state = 1;
  L2Model* l2 = nullptr;
  std::function<void()> poll_signals;

  // What came out
  std::vector<Counters> counters;
  std::vector<Report> reports;
  std::unordered_map<u64, size_t> report_index;
  std::string output;
  u64 instructions = 0, blocks_done = 0, barriers = 0, progress = 0;
  u32 trips_before = 0, trips_after = 0;  // products, the most of any warp

  // Ordering between clusters
  std::vector<WriteRecord> write_records;
  std::vector<VectorClock> snapshots;
  std::unordered_map<u64, Knowledge> released;  // by address / 4

  u32 random() {  // 16 bits
    random_state = random_state * 1664525 + 1013904223;
    return random_state >> 16;
  }
};

// What a handler gets: the warp, the lanes that take part and the instruction's counters.
struct Context {
  Machine* machine;
  Block* block;
  Warp* warp;
  u8* regs;
  const u8* constants;
  const s32* operands;
  Counters* counters;
  u32 mask, pc;
};

[[noreturn]] void fault(Context& c, int lane, const std::string& message);
void report(Context& c, ReportKind kind, int lane, u32 other_pc, const std::string& message);
std::string agent_name(const Block& block, int agent);
void block_index(const Machine& m, u32 cluster, u32 rank, u32* id);  // cluster.cpp
inline int line_of(const Context& c, u32 pc) { return c.machine->program[pc].line; }

}  // namespace ptxsim
