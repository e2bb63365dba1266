// Runs the blocks of a grid, one cluster after another unless they wait for each other. A block that is in no
// cluster is one of its own.
#include <memory>
#include <numeric>

#include "memory.hpp"
#include "scheduler.hpp"

namespace ptxsim {

namespace {

constexpr int kMostResident = 1024;

class Arena {
 public:
  template <class T = u8>
  T* get(size_t n) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, n * sizeof(T) + 64)) throw Fault("out of memory");
    blocks_.push_back(p);
    return static_cast<T*>(p);
  }
  ~Arena() {
    for (void* p : blocks_) std::free(p);
  }

 private:
  std::vector<void*> blocks_;
};

u32 special_register(const Machine& m, const Block& b, const Warp& w, int which, int lane) {
  u32 thread = u32(32 * w.id + lane);
  const u32* dim = m.block_dim;
  switch (which) {  // numbers: SPECIAL_REGISTERS in isa.py
    case 0:
      return thread % dim[0];
    case 1:
      return thread / dim[0] % dim[1];
    case 2:
      return thread / dim[0] / dim[1];
    case 3:
    case 4:
    case 5:
      return dim[which - 3];
    case 6:
    case 7:
    case 8:
      return b.id[which - 6];
    case 9:
    case 10:
    case 11:
      return m.grid[which - 9];
    case 12:
      return u32(lane);
    case 13:
      return u32(w.id);
    case 14:
      return u32(b.n_warps);
    case 15:
      return b.number % 108;  // %smid of a GPU with 108 SMs
    case 16:
      return 108;
    case 18:
      return 1u << lane;
    case 19:
      return (1u << lane) - 1;
    case 20:
      return lane == 31 ? ~0u : (2u << lane) - 1;
    case 21:
      return lane == 31 ? 0 : ~0u << (lane + 1);
    case 22:
      return ~0u << lane;
    case 23:
      return m.shared_bytes;
    case 24:
      return u32(b.rank);
    case 25:
      return m.cluster_blocks;
    case 26:
      return m.explicit_cluster ? ~0u : 0;  // a predicate: a bit a lane
    case 27:
    case 28:
    case 29:
      return b.id[which - 27] / m.cluster_dim[which - 27];
    case 30:
    case 31:
    case 32:
      return m.grid[which - 30] / m.cluster_dim[which - 30];
    case 33:
    case 34:
    case 35:
      return b.id[which - 33] % m.cluster_dim[which - 33];
    case 36:
    case 37:
    case 38:
      return m.cluster_dim[which - 36];
    default:
      return 0;
  }
}

class GridRun {
 public:
  GridRun(Machine& m, const LaunchOptions& options)
      : m_(m),
        options_(options),
        total_(u64(m.grid[0]) * m.grid[1] * m.grid[2] / m.cluster_blocks),
        wanted_(std::max(1, options.resident)) {
    m.random_state = m.seed * 2654435761u + 12345;
  }

  void run() {
    while (started_ < total_ || !active_.empty()) {
      while (int(active_.size()) < wanted_ && started_ < total_) start_cluster();
      for (size_t i = 0; i < active_.size();) i += give_turn(i) ? 1 : 0;
      if (active_.empty()) wanted_ = std::max(1, options_.resident);
    }
  }

 private:
  Block* new_block() {
    auto owned = std::make_unique<Block>();
    Block* b = owned.get();
    size_t n = m_.shared_bytes, threads = size_t(m_.block_dim[0]) * m_.block_dim[1] * m_.block_dim[2];
    b->n_threads = int(threads);
    b->n_warps = int((threads + 31) / 32);
    b->warps.resize(size_t(b->n_warps));
    for (u8** p : {&b->smem, &b->initialised, &b->in_flight, &b->plainly_read}) *p = arena_.get(n);
    b->writer = arena_.get<u16>(n);
    for (u32** p : {&b->write_stamp, &b->write_pc, &b->read_pc}) *p = arena_.get<u32>(n);
    for (u32** p : {&b->chunk_write, &b->chunk_read}) *p = arena_.get<u32>(n / 16 + 2);
    b->read_stamp = arena_.get<u32>(m_.races ? n * size_t(b->n_warps + 1) : 0);
    for (Warp& w : b->warps) {
      w.regs = arena_.get(m_.register_bytes);
      w.local = arena_.get(size_t(32) * m_.local_bytes);
    }
    blocks_.push_back(std::move(owned));
    return b;
  }

  void reset_shared(Block& b) {
    size_t n = m_.shared_bytes;
    std::memset(b.smem, 0xff, n);  // a NaN in every format
    for (u8* p : {b.initialised, b.in_flight, b.plainly_read}) std::memset(p, 0, n);
    std::memset(b.writer, 0, 2 * n);
    for (u32* p : {b.write_stamp, b.write_pc, b.read_pc}) std::memset(p, 0, 4 * n);
    for (u32* p : {b.chunk_write, b.chunk_read}) std::memset(p, 0, n / 4 + 8);
    if (m_.races) std::memset(b.read_stamp, 0, 4 * n * size_t(b.n_warps + 1));
  }

  void reset_warp(Block& b, int id) {
    Warp& w = b.warps[size_t(id)];
    u8 *regs = w.regs, *local = w.local;
    w = Warp();
    w.regs = regs;
    w.local = local;
    w.id = id;
    w.agent = b.first_agent + id;
    int lanes = std::min(32, b.n_threads - 32 * id);
    w.live = lanes == 32 ? ~0u : (1u << lanes) - 1;
    w.groups.assign(1, Group{m_.entry, w.live});
    if (m_.count_trips) w.trips.ready.assign(m_.register_bytes / 4, 0);
    std::memset(regs, 0xff, m_.register_bytes);
    std::memset(local, 0xff, size_t(32) * m_.local_bytes);
    for (auto [which, offset] : m_.special_registers)
      for (int l = 0; l < 32; l++)
        reinterpret_cast<u32*>(regs + offset)[l] = special_register(m_, b, w, which, l);
  }

  Cluster* new_cluster() {
    clusters_.push_back(std::make_unique<Cluster>());
    Cluster* cluster = clusters_.back().get();
    for (u32 rank = 0; rank < m_.cluster_blocks; rank++) {
      Block* b = new_block();
      b->cluster = cluster;
      b->rank = int(rank);
      b->first_agent = int(rank) * b->agents();
      cluster->blocks.push_back(b);
    }
    return cluster;
  }

  void start_cluster() {
    Cluster* cluster;
    if (idle_.empty()) {
      cluster = new_cluster();
    } else {
      cluster = idle_.back();
      idle_.pop_back();
    }
    std::vector<Block*> blocks = std::move(cluster->blocks);
    *cluster = Cluster();
    cluster->number = options_.order.empty() ? u32(started_) : options_.order[started_];
    cluster->blocks = std::move(blocks);
    started_++;
    for (Block* b : cluster->blocks) start_block(*b);
    cluster->missing = cluster->live();
    active_.push_back(cluster);
  }

  void start_block(Block& b) {
    block_index(m_, b.cluster->number, u32(b.rank), b.id);
    b.number = b.id[0] + m_.grid[0] * (b.id[1] + m_.grid[1] * b.id[2]);
    b.live = u32(b.n_threads);
    b.polls = 0;
    b.bulk_used = false;
    b.unreleased_pc = ~0u;
    b.visitors.clear();
    b.mbarriers.clear();
    b.bulk.clear();
    for (Barrier& bar : b.barriers) bar = Barrier();
    reset_shared(b);
    for (int i = 0; i < b.n_warps; i++) reset_warp(b, i);
  }

  Context context(Block& b, Warp& w) {
    Context c{};
    c.machine = &m_;
    c.block = &b;
    c.warp = &w;
    c.regs = w.regs;
    c.constants = m_.aligned_constants;
    c.operands = m_.operands.data();
    return c;
  }

  struct Turn {
    u64 executed = 0;
    bool progressed = false, yielded = false;
  };

  // Every live warp once, from a random one on if there is a seed
  bool run_warps(Block& b, Turn& turn) {
    constexpr int kSlice = 20000, kDivergedSlice = 2000;
    bool ran = false;
    u32 first = m_.seed ? m_.random() : 0;
    for (int k = 0; k < b.n_warps; k++) {
      Warp& w = b.warps[(u32(k) + first) % u32(b.n_warps)];
      if (!w.live) continue;
      Context c = context(b, w);
      int budget = m_.seed ? 16 + int(m_.random() % 512) : kSlice;
      if (w.groups.size() > 1) budget = std::min(budget, kDivergedSlice);
      u64 polls = b.polls;
      int n = run_warp(c, budget, w.spinning);
      w.spinning = w.groups.size() > 1 && n >= 100 && b.polls - polls > u64(n) / 64;
      turn.yielded |= w.yielding && w.live;
      if (!n) continue;
      ran = true;
      turn.executed += u64(n);
      m_.instructions += u64(n);
    }
    if (!b.live || b.bulk.empty()) return ran;
    Context c = context(b, b.warps[0]);
    return bulk_step(c) || ran;
  }

  // Every live block once, likewise
  bool run_blocks(Cluster& cluster, Turn& turn) {
    size_t n = cluster.blocks.size(), first = n > 1 && m_.seed ? m_.random() : 0;
    bool ran = false;
    for (size_t k = 0; k < n; k++) ran |= run_warps(*cluster.blocks[(k + first) % n], turn);
    for (size_t k = 0; k < n && !ran; k++) {
      Block& b = *cluster.blocks[k];
      Context c = context(b, b.warps[0]);
      ran = bulk_force_one(c);
    }
    return ran;
  }

  // Lets cluster i run. False: it is done and gone from the list.
  bool give_turn(size_t i) {
    constexpr int kRounds = 64;
    constexpr u64 kInstructions = 200000;
    Cluster& cluster = *active_[i];
    u64 polls_before = polls(cluster);
    Turn turn;
    for (int round = 0; round < kRounds && cluster.live() && turn.executed < kInstructions; round++) {
      if (!run_blocks(cluster, turn)) break;
      turn.progressed = true;
    }
    check_limits(cluster);
    if (!cluster.live()) {
      m_.blocks_done += cluster.blocks.size();
      idle_.push_back(&cluster);
      active_.erase(active_.begin() + s64(i));
      return false;
    }
    if (!turn.progressed)
      throw Fault("deadlock in " + name(cluster) +
                  ": barrier or warp sync reached by only part of the threads:" + where(cluster));
    u64 polled = polls(cluster) - polls_before;
    watch_for_livelock(cluster, polled > turn.executed / 64 || turn.yielded);
    bool waiting = polled > turn.executed / 16 + 100 || turn.yielded;
    if (started_ < total_ && waiting && int(active_.size()) < kMostResident)
      wanted_ = int(active_.size()) + 1;
    return true;
  }

  void watch_for_livelock(const Cluster& cluster, bool polling) {
    if (!polling || m_.progress != last_progress_ || started_ < total_)
      idle_turns_ = 0;
    else if (++idle_turns_ > 50 + 2 * int(active_.size()))
      throw Fault("livelock: threads poll for something that no thread will do any more; " + name(cluster) +
                  ":" + where(cluster));
    last_progress_ = m_.progress;
  }

  void check_limits(const Cluster& cluster) {
    if (m_.instructions > m_.max_instructions)
      throw Fault(format("instruction budget of %llu warp instructions exceeded; ",
                         (unsigned long long)m_.max_instructions) +
                  name(cluster) + ":" + where(cluster));
    if (m_.poll_signals && m_.instructions - last_poll_ > (1u << 22)) {
      last_poll_ = m_.instructions;
      m_.poll_signals();
    }
  }

  static u64 polls(const Cluster& cluster) {
    u64 n = 0;
    for (const Block* b : cluster.blocks) n += b->polls;
    return n;
  }

  static std::string name(const Block& b) { return format("block (%u,%u,%u)", b.id[0], b.id[1], b.id[2]); }
  static std::string name(const Cluster& cluster) {
    std::string first = name(*cluster.blocks[0]);
    return cluster.blocks.size() == 1 ? first : "the cluster from " + first + " on";
  }
  std::string where(const Cluster& cluster) const {
    if (cluster.blocks.size() == 1) return where_are(m_, *cluster.blocks[0]);
    std::string text;
    for (const Block* b : cluster.blocks)
      if (b->live) text += " " + name(*b) + ":" + where_are(m_, *b);
    return text;
  }

  Machine& m_;
  const LaunchOptions& options_;
  Arena arena_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<Cluster*> active_, idle_;
  u64 total_, started_ = 0, last_progress_ = ~0ull, last_poll_ = 0;
  int wanted_, idle_turns_ = 0;
};

}  // namespace

void run_grid(Machine& m, const LaunchOptions& options) { GridRun(m, options).run(); }

}  // namespace ptxsim
