// Shared memory: bounds, initialisation, races, asynchronous copies in flight, bank conflicts.
#include "memory.hpp"

namespace ptxsim {

namespace {

constexpr u16 kStrongWriter = 0x8000;

const char* verb(int flags) { return flags & kWrite ? "write" : "read"; }

// Every other agent that has accessed the block's shared memory is known at least up to here.
u32 oldest_seen(const Context& c, const Block& b, int self) {
  const VectorClock& seen = c.warp->sync.seen;
  u32 least = ~0u;
  for (int r = b.first_agent; r < b.first_agent + b.shared_agents(); r++)
    if (r != self) least = std::min(least, seen[r]);
  for (const auto& [r, visitor] : b.visitors)
    if (r != self) least = std::min(least, seen[r]);
  return least;
}

std::string byte_name(const Context& c, const Block& b, u32 byte) {
  std::string name = format("shared byte %u", byte);
  return &b == c.block ? name : name + format(" of block %u", b.number);
}

void check_in_flight(Context& c, const Block& b, int lane, u32 address, int size) {
  for (int i = 0; i < size; i++)
    if (b.in_flight[address + i]) {
      u32 pc = b.write_pc[address + i];
      report(c, ReportKind::AsyncHazard, lane, pc,
             format("%s accessed while an async copy (line %d) into it is still in flight",
                    byte_name(c, b, address + i).c_str(), line_of(c, pc)));
      return;
    }
}

void check_initialised(Context& c, const Block& b, int lane, u32 address, int size) {
  for (int i = 0; i < size; i++)
    if (!b.initialised[address + i] && !b.in_flight[address + i]) {
      std::string where = &b == c.block ? "" : format(" of block %u", b.number);
      report(c, ReportKind::UninitShared, lane, 0,
             format("read of uninitialised shared memory%s at byte %u", where.c_str(), address + i));
      return;
    }
}

bool report_race(Context& c, const Block& b, int lane, u32 byte, int flags, int agent, u32 pc,
                 const char* did, const char* about) {
  bool same = c.block->owns(agent);
  report(c, ReportKind::Race, lane, pc,
         format("race on %s: %s by warp %d, %s by %s at %sline %d with no barrier%s in between",
                byte_name(c, b, byte).c_str(), verb(flags), c.warp->id, did,
                agent_name(*c.block, agent).c_str(), about, line_of(c, pc), same ? "" : " of the cluster"));
  return true;
}

bool race_with_writer(Context& c, const Block& b, int lane, u32 begin, u32 end, u32 access, int flags,
                      int self) {
  bool strong = flags & (kAtomic | kStrongAccess);
  for (u32 x = begin; x < end; x++) {
    int writer = b.writer[x] & ~kStrongWriter;
    if (!b.write_stamp[x] || writer == self || writer == c.warp->agent) continue;
    if (strong && b.writer[x] & kStrongWriter) continue;
    if (b.write_stamp[x] <= c.warp->sync.seen[writer]) continue;
    if (flags & kAsyncProxy && b.is_engine(writer) && b.write_stamp[x] <= c.warp->sync.reached[writer])
      continue;
    if (flags & kWrite && b.initialised[x] && stores_same_byte(c, lane, int(x - access), b.smem[x])) continue;
    return report_race(c, b, lane, x, flags, writer, b.write_pc[x], "written", "");
  }
  return false;
}

// A copy into bytes that only asynchronous products and copies have read since they were written need not
// come after a release: they read nothing later than when they were waited for, and what was executed before
// an arrival of any kind is over (CUTLASS's ClusterBarrier::arrive).
bool race_with_reader(Context& c, const Block& b, int lane, u32 begin, u32 end, u32 access, int flags,
                      int self) {
  auto raced = [&](int r, const u32* stamps) {
    if (r == self || r == c.warp->agent) return false;
    u32 seen = c.warp->sync.seen[r];
    u32 reached = flags & kAsyncProxy ? std::max(seen, c.warp->sync.reached[r]) : seen;
    for (u32 x = begin; x < end; x++)
      if (stamps[x] > (b.plainly_read[x] ? seen : reached) &&
          !(b.initialised[x] && stores_same_byte(c, lane, int(x - access), b.smem[x])))
        return report_race(c, b, lane, x, flags, r, b.read_pc[x], "read", "about ");
    return false;
  };
  for (int r = 0; r < b.shared_agents(); r++)
    if (raced(b.first_agent + r, b.read_stamp + size_t(r) * c.machine->shared_bytes)) return true;
  for (const auto& [r, visitor] : b.visitors)
    if (!visitor.reads.empty() && raced(r, visitor.reads.data())) return true;
  return false;
}

// Where the stamps of the agent's reads of this block's shared memory are
u32* read_stamps(Context& c, Block& b, int agent) {
  if (b.owns(agent)) return b.read_stamp + size_t(agent - b.first_agent) * c.machine->shared_bytes;
  std::vector<u32>& reads = b.visitors[agent].reads;
  if (reads.empty()) reads.resize(c.machine->shared_bytes);
  return reads.data();
}

// The usual case of check_shared for an aligned access of at most 16 bytes by a warp; false: look closer.
template <class W>
inline bool quick_check(Block& b, u32 address, int size, int flags, u32 oldest, u32 pc, u32* read_stamps,
                        u16 self) {
  const W ones = W(0x0101010101010101ull);
  u32 chunk = address >> 4, now = b.cluster->clock;
  if (b.chunk_write[chunk] > oldest || (flags & kWrite && b.chunk_read[chunk] > oldest)) return false;
  for (int i = 0; i < size; i += int(sizeof(W))) {
    W in_flight, initialised;
    std::memcpy(&in_flight, b.in_flight + address + i, sizeof(W));
    std::memcpy(&initialised, b.initialised + address + i, sizeof(W));
    if (in_flight || (flags & kRead && initialised != ones)) return false;
  }
  if (flags & kWrite) {
    b.chunk_write[chunk] = now;
    std::memset(b.initialised + address, 1, size);
    std::memset(b.plainly_read + address, 0, size);
    std::fill_n(b.writer + address, size, self);
    for (int i = 0; i < size; i++) {
      b.write_stamp[address + i] = now;
      b.write_pc[address + i] = pc;
    }
  } else {
    b.chunk_read[chunk] = now;
    std::memset(b.plainly_read + address, 1, size);
    for (int i = 0; i < size; i++) {
      read_stamps[address + i] = now;
      b.read_pc[address + i] = pc;
    }
  }
  return true;
}

inline bool quick_check_any(Block& b, u32 address, int size, int flags, u32 oldest, u32 pc, u32* stamps,
                            u16 self) {
  switch (size) {
    case 16:
      return quick_check<u64>(b, address, 16, flags, oldest, pc, stamps, self);
    case 8:
      return quick_check<u64>(b, address, 8, flags, oldest, pc, stamps, self);
    case 4:
      return quick_check<u32>(b, address, 4, flags, oldest, pc, stamps, self);
    case 2:
      return quick_check<u16>(b, address, 2, flags, oldest, pc, stamps, self);
    default:
      return quick_check<u8>(b, address, 1, flags, oldest, pc, stamps, self);
  }
}

}  // namespace

bool stores_same_byte(const Context& c, int lane, int offset, u8 current) {
  const Instruction& in = c.machine->program[c.pc];
  if (c.machine->strict) return false;
  if (in.op == Op::Stmatrix) return stmatrix_byte(c, in, lane, offset) == current;
  if (in.op != Op::St) return false;
  int size = type_size(in.type), within = offset % size;
  s32 code = source_code(c, in, 1 + offset / size) + (within >= 8 ? 256 : 0);
  return u8(lane_value(c, code, lane) >> 8 * (within % 8)) == current;
}

void note_shared_write(Block& b, u32 address, int size, int agent, u32 pc) {
  u32 now = b.cluster->clock;
  std::fill_n(b.writer + address, size, u16(agent));
  std::memset(b.plainly_read + address, 0, size);
  for (int i = 0; i < size; i++) {
    b.write_stamp[address + i] = now;
    b.write_pc[address + i] = pc;
  }
  for (u32 chunk = address >> 4; chunk <= (address + size - 1) >> 4; chunk++) b.chunk_write[chunk] = now;
}

// Bytes [address, +size) accessed by `agent`: the warp itself or the bulk engine on its behalf
void check_shared(Context& c, Block& b, int lane, u32 address, int size, int flags, int agent) {
  if (!(flags & kAsync)) check_in_flight(c, b, lane, address, size);
  if (flags & kRead) check_initialised(c, b, lane, address, size);
  if (!c.machine->races) {
    if (flags & kWrite) {
      std::memset(b.initialised + address, 1, size);
      for (int i = 0; i < size; i++) b.write_pc[address + i] = c.pc;
    }
    return;
  }
  bool strong = flags & (kAtomic | kStrongAccess);
  u32 oldest = oldest_seen(c, b, agent), now = b.cluster->clock;
  if (!b.owns(agent)) note_visit(c, b, agent);
  for (u32 chunk = address >> 4; chunk <= (address + size - 1) >> 4; chunk++) {
    u32 begin = std::max(address, chunk << 4), end = std::min(address + size, (chunk + 1) << 4);
    bool raced =
        b.chunk_write[chunk] > oldest && race_with_writer(c, b, lane, begin, end, address, flags, agent);
    if (!raced && flags & kWrite && b.chunk_read[chunk] > oldest)
      race_with_reader(c, b, lane, begin, end, address, flags, agent);
    if (flags & kWrite) {
      std::memset(b.initialised + begin, 1, end - begin);
      note_shared_write(b, begin, int(end - begin), agent | (strong ? kStrongWriter : 0), c.pc);
    } else if (!strong) {
      b.chunk_read[chunk] = now;
      u32* stamps = read_stamps(c, b, agent);
      for (u32 x = begin; x < end; x++) {
        stamps[x] = now;
        b.read_pc[x] = c.pc;
        if (!(flags & kAsyncProxy)) b.plainly_read[x] = 1;
      }
    }
  }
}

// The async proxy reads bytes that a warp wrote: the writer needs a proxy fence.
void check_proxy(Context& c, int lane, u32 address, int size) {
  Block& b = *c.block;
  if (!c.machine->races) return;
  for (u32 x = address; x < address + size; x++) {
    int writer = b.writer[x] & ~kStrongWriter;
    if (!b.write_stamp[x] || b.is_engine(writer) || b.write_stamp[x] <= c.warp->sync.proxied[writer])
      continue;
    report(c, ReportKind::Proxy, lane, b.write_pc[x],
           format("shared byte %u is read through the async proxy, but no fence.proxy.async follows the "
                  "write by %s at "
                  "line %d",
                  x, agent_name(b, writer).c_str(), line_of(c, b.write_pc[x])));
    return;
  }
}

// Wavefronts of one request: 32, 16 or 8 lanes at a time (for 4, 8 or 16 bytes each); a phase takes as many
// wavefronts as the busiest bank has different words.
void count_wavefronts(Context& c, const u32* address, u32 mask, int size) {
  int lanes = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += lanes) {
    u32 phase = mask & (lanes == 32 ? ~0u : ((1u << lanes) - 1) << first);
    if (!phase) continue;
    c.counters->ideal_wavefronts++;
    if (size >= 4 && size <= 16) {  // usual: no two lanes share a bank
      int shift = size == 16 ? 4 : size == 8 ? 3 : 2;
      u32 seen = 0;
      bool shared = false;
      for_lanes(phase, [&](int l) {
        u32 bank = 1u << ((address[l] >> shift) & (lanes - 1));
        shared |= (seen & bank) != 0;
        seen |= bank;
      });
      if (!shared) {
        c.counters->wavefronts++;
        continue;
      }
    }
    u32 words[32][32];
    u8 n[32] = {};
    int busiest = 0;
    for_lanes(phase, [&](int l) {
      for (u32 word = address[l] >> 2; word <= (address[l] + size - 1) >> 2; word++) {
        int bank = word & 31;
        if (std::find(words[bank], words[bank] + n[bank], word) != words[bank] + n[bank]) continue;
        words[bank][n[bank]++] = word;
        busiest = std::max<int>(busiest, n[bank]);
      }
    });
    c.counters->wavefronts += busiest;
  }
}

void shared_access(Context& c, const u32* address, u32 mask, int size, int flags, u8** pointer) {
  Block& b = *c.block;
  u32 limit = c.machine->shared_bytes;
  bool quick = c.machine->races && !(flags & (kAtomic | kStrongAccess)) && size <= 16;
  u32 oldest = quick ? oldest_seen(c, b, c.warp->agent) : 0;
  u32* stamps = quick ? b.read_stamp + size_t(c.warp->id) * limit : nullptr;
  for (u32 left = mask; left; left &= left - 1) {
    int l = first_lane(left);
    u32 x = address[l];
    if (x & (size - 1)) fault(c, l, format("misaligned %d-byte shared access at byte 0x%x", size, x));
    if (u64(x) + size > limit) x = shared_place(c, l, x).offset;  // may name this block
    if (u64(x) + size > limit)
      fault(c, l,
            format("out-of-bounds shared %s of %d bytes at byte %u (block has %u)", verb(flags), size, x,
                   limit));
    if (pointer) pointer[l] = b.smem + x;
    if (quick && quick_check_any(b, x, size, flags, oldest, c.pc, stamps, u16(c.warp->agent))) continue;
    check_shared(c, b, l, x, size, flags, c.warp->agent);
  }
  if (mask && !(flags & kUncounted)) {
    c.counters->requests++;
    c.counters->bytes += u64(__builtin_popcount(mask)) * size;
    count_wavefronts(c, address, mask, size);
  }
}

}  // namespace ptxsim
