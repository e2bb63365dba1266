// Runs the blocks of a grid, one after another unless they wait for each other.
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
    case 25:
      return 1;
    default:
      return 0;
  }
}

class GridRun {
 public:
  GridRun(Machine& m, const LaunchOptions& options)
      : m_(m),
        options_(options),
        total_(u64(m.grid[0]) * m.grid[1] * m.grid[2]),
        wanted_(std::max(1, options.resident)) {
    m.random_state = m.seed * 2654435761u + 12345;
  }

  void run() {
    while (started_ < total_ || !active_.empty()) {
      while (int(active_.size()) < wanted_ && started_ < total_) start_block();
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
    for (u8** p : {&b->smem, &b->initialised, &b->in_flight, &b->writer}) *p = arena_.get(n);
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
    for (u8* p : {b.initialised, b.in_flight, b.writer}) std::memset(p, 0, n);
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

  void start_block() {
    Block* b;
    if (idle_.empty()) {
      b = new_block();
    } else {
      b = idle_.back();
      idle_.pop_back();
    }
    u32 number = options_.order.empty() ? u32(started_) : options_.order[started_];
    started_++;
    b->number = number;
    b->id[0] = number % m_.grid[0];
    b->id[1] = number / m_.grid[0] % m_.grid[1];
    b->id[2] = number / m_.grid[0] / m_.grid[1];
    b->clock = 1;
    b->live = u32(b->n_threads);
    b->polls = 0;
    b->bulk_used = false;
    b->unreleased_pc = ~0u;
    b->mbarriers.clear();
    b->bulk.clear();
    for (Barrier& bar : b->barriers) bar = Barrier();
    reset_shared(*b);
    for (int i = 0; i < b->n_warps; i++) reset_warp(*b, i);
    active_.push_back(b);
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
    return bulk_step(c) || ran || bulk_force_one(c);
  }

  // Lets block i run. False: it is done and gone from the list.
  bool give_turn(size_t i) {
    constexpr int kRounds = 64;
    constexpr u64 kInstructions = 200000;
    Block& b = *active_[i];
    u64 polls_before = b.polls;
    Turn turn;
    for (int round = 0; round < kRounds && b.live && turn.executed < kInstructions; round++) {
      if (!run_warps(b, turn)) break;
      turn.progressed = true;
    }
    check_limits(b);
    if (!b.live) {
      m_.blocks_done++;
      idle_.push_back(&b);
      active_.erase(active_.begin() + s64(i));
      return false;
    }
    if (!turn.progressed)
      throw Fault("deadlock in " + name(b) +
                  ": barrier or warp sync reached by only part of the threads:" + where_are(m_, b));
    u64 polls = b.polls - polls_before;
    watch_for_livelock(b, polls > turn.executed / 64 || turn.yielded);
    bool waiting = polls > turn.executed / 16 + 100 || turn.yielded;
    if (started_ < total_ && waiting && int(active_.size()) < kMostResident)
      wanted_ = int(active_.size()) + 1;
    return true;
  }

  void watch_for_livelock(const Block& b, bool polling) {
    if (!polling || m_.progress != last_progress_ || started_ < total_)
      idle_turns_ = 0;
    else if (++idle_turns_ > 50 + 2 * int(active_.size()))
      throw Fault("livelock: threads poll for something that no thread will do any more; " + name(b) + ":" +
                  where_are(m_, b));
    last_progress_ = m_.progress;
  }

  void check_limits(const Block& b) {
    if (m_.instructions > m_.max_instructions)
      throw Fault(format("instruction budget of %llu warp instructions exceeded; ",
                         (unsigned long long)m_.max_instructions) +
                  name(b) + ":" + where_are(m_, b));
    if (m_.poll_signals && m_.instructions - last_poll_ > (1u << 22)) {
      last_poll_ = m_.instructions;
      m_.poll_signals();
    }
  }

  static std::string name(const Block& b) { return format("block (%u,%u,%u)", b.id[0], b.id[1], b.id[2]); }

  Machine& m_;
  const LaunchOptions& options_;
  Arena arena_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Block*> active_, idle_;
  u64 total_, started_ = 0, last_progress_ = ~0ull, last_poll_ = 0;
  int wanted_, idle_turns_ = 0;
};

}  // namespace

void run_grid(Machine& m, const LaunchOptions& options) { GridRun(m, options).run(); }

}  // namespace ptxsim
