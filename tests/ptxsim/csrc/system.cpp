// Faults, reports, and what talks to the host: printf, assert, trap, nanosleep.
#include <cstdarg>
#include <cstdio>

#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {

std::string format(const char* pattern, ...) {
  char buffer[1024];
  va_list args;
  va_start(args, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, args);
  va_end(args);
  return buffer;
}

static void thread_index(const Context& c, int lane, u32* out) {
  u32 linear = c.warp->id * 32 + std::max(lane, 0);
  const u32* dim = c.machine->block_dim;
  out[0] = linear % dim[0];
  out[1] = linear / dim[0] % dim[1];
  out[2] = linear / dim[0] / dim[1];
}

void fault(Context& c, int lane, const std::string& message) {
  u32 t[3];
  thread_index(c, lane, t);
  const u32* b = c.block->id;
  throw Fault(format("%s at PTX line %d, block (%u,%u,%u), thread (%u,%u,%u)", message.c_str(),
                     line_of(c, c.pc), b[0], b[1], b[2], t[0], t[1], t[2]));
}

// One report for each kind and pair of instructions; the first occurrence is described, all are counted.
void report(Context& c, ReportKind kind, int lane, u32 other_pc, const std::string& message) {
  Machine& m = *c.machine;
  u64 key = u64(kind) << 58 ^ u64(c.pc) << 29 ^ other_pc;
  auto [it, fresh] = m.report_index.try_emplace(key, m.reports.size());
  if (!fresh) {
    m.reports[it->second].count++;
    return;
  }
  Report r{kind, c.pc, {}, {}, 1, message};
  std::copy_n(c.block->id, 3, r.block);
  thread_index(c, lane, r.thread);
  m.reports.push_back(r);
}

// As seen from `block`; the agent is of its cluster.
std::string agent_name(const Block& block, int agent) {
  int rank = agent / block.agents(), in_block = agent % block.agents();
  std::string name = block.is_engine(agent) ? "the bulk-copy engine" : format("warp %d", in_block);
  return rank == block.rank ? name
                            : name + format(" of block %u", block.cluster->blocks[size_t(rank)]->number);
}

namespace {

std::string read_string(Context& c, u64 address) {
  Allocation* a = find_allocation(*c.machine, address);
  if (!a) return "?";
  auto* text = reinterpret_cast<const char*>(a->host) + (address - a->base);
  return std::string(text, strnlen(text, a->base + a->size - address));
}

void trap(Context& c, const Instruction&) { fault(c, first_lane(c.mask), "trap executed"); }

void assert_fail(Context& c, const Instruction& in) {
  int l = first_lane(c.mask);
  fault(c, l, "device assertion failed: " + read_string(c, lane_source(c, in, 0, l)));
}

void nanosleep(Context& c, const Instruction&) {
  c.warp->yielding = true;
  c.block->polls += 100;
}

// Takes a thread's printf arguments from its local memory.
class PrintfArguments {
 public:
  PrintfArguments(const u8* local, u64 limit, u64 at) : local_(local), limit_(limit), at_(at) {}
  u64 next(u32 size) {
    at_ = (at_ + size - 1) & ~u64(size - 1);
    u64 value = 0;
    if (at_ + size <= limit_) std::memcpy(&value, local_ + at_, size);
    at_ += size;
    return value;
  }

 private:
  const u8* local_;
  u64 limit_, at_;
};

std::string format_one(Context& c, const std::string& flags, char conversion, bool is_long,
                       PrintfArguments& args) {
  std::string spec = "%" + flags;
  char buffer[512];
  if (std::strchr("feEgG", conversion)) {
    u64 bits = args.next(8);
    double value;
    std::memcpy(&value, &bits, 8);
    std::snprintf(buffer, sizeof buffer, (spec + conversion).c_str(), value);
    return buffer;
  }
  if (conversion == 's') return read_string(c, args.next(8));
  if (conversion == 'p') return format("0x%llx", (unsigned long long)args.next(8));
  u64 raw = args.next(is_long ? 8 : 4);
  bool sign = conversion == 'd' || conversion == 'i';
  long long value = sign && !is_long ? s32(raw) : (long long)(raw);
  std::snprintf(buffer, sizeof buffer, (spec + "ll" + conversion).c_str(), value);
  return buffer;
}

std::string format_device(Context& c, const std::string& pattern, PrintfArguments args) {
  std::string out;
  for (size_t i = 0; i < pattern.size(); i++) {
    if (pattern[i] != '%') {
      out += pattern[i];
      continue;
    }
    if (++i < pattern.size() && pattern[i] == '%') {
      out += '%';
      continue;
    }
    std::string flags;
    bool is_long = false;
    for (; i < pattern.size() && std::strchr("-+ #0123456789.lhz", pattern[i]); i++) {
      if (pattern[i] == 'l' || pattern[i] == 'z')
        is_long = true;
      else if (pattern[i] != 'h')
        flags += pattern[i];
    }
    out += format_one(c, flags, i < pattern.size() ? pattern[i] : 'd', is_long, args);
  }
  return out;
}

// Sources: addresses of the format and of the arguments
void device_printf(Context& c, const Instruction& in) {
  constexpr size_t kLimit = 1 << 20;
  for_lanes(c.mask, [&](int l) {
    u32 bytes = c.machine->local_bytes;
    u64 at = lane_source(c, in, 1, l) & ~kLocalWindow;
    PrintfArguments args(c.warp->local + size_t(l) * bytes, bytes, at);
    std::string text = format_device(c, read_string(c, lane_source(c, in, 0, l)), args);
    if (c.machine->output.size() < kLimit) c.machine->output += text;
  });
}

// aux: griddepcontrol.wait
void nothing(Context& c, const Instruction& in) {
  if (in.aux) c.warp->sync.waited = true;
}

}  // namespace

Handler system_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Nop:
      return nothing;
    case Op::Trap:
      return trap;
    case Op::AssertFail:
      return assert_fail;
    case Op::Nanosleep:
      return nanosleep;
    case Op::Vprintf:
      return device_printf;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
