// Global memory: bounds, alignment, initialisation, sectors.
#include "l2_model.hpp"
#include "memory.hpp"

namespace ptxsim {

Allocation* find_allocation(Machine& m, u64 address) {
  auto contains = [address](const Allocation& a) { return address >= a.base && address < a.base + a.size; };
  if (m.last_allocation < m.allocations.size() && contains(m.allocations[m.last_allocation]))
    return &m.allocations[m.last_allocation];
  auto next = std::upper_bound(m.allocations.begin(), m.allocations.end(), address,
                               [](u64 x, const Allocation& a) { return x < a.base; });
  if (next == m.allocations.begin() || !contains(*(next - 1))) return nullptr;
  m.last_allocation = size_t(next - 1 - m.allocations.begin());
  return &*(next - 1);
}

static std::string buffer_name(const Allocation& a) {
  return a.id >= 0    ? format("buffer #%d", a.id)
         : a.id == -1 ? std::string("a module variable")
         : a.id == -3 ? std::string("the parameters")
                      : format("registered buffer #%d", -10 - a.id);
}

std::string describe_address(Machine& m, u64 address) {
  const Allocation* best = nullptr;
  s64 best_distance = 0;
  for (const Allocation& a : m.allocations) {
    s64 distance = address < a.base ? s64(address - a.base) : s64(address - (a.base + a.size)) + 1;
    if (!best || std::llabs(distance) < std::llabs(best_distance)) best = &a, best_distance = distance;
  }
  if (!best) return "no allocations";
  return format("%lld bytes %s %s of %llu bytes", std::llabs(best_distance),
                best_distance < 0 ? "before" : "past the end of", buffer_name(*best).c_str(),
                (unsigned long long)best->size);
}

namespace {

// Counts the distinct 32-byte sectors (shift 5) or lines (shift 7) of a request and hands each to f.
template <class F>
int distinct_units(const u64* address, u32 mask, int size, int shift, F f) {
  u64 unit[96];
  int n = 0;
  u64 previous = ~0ull;
  bool ascending = true;
  for (; mask; mask &= mask - 1) {
    int l = first_lane(mask);
    for (u64 u = address[l] >> shift, end = (address[l] + size - 1) >> shift; u <= end; u++) {
      if (u == previous) continue;
      if (previous != ~0ull && u < previous) ascending = false;
      unit[n++] = previous = u;
    }
  }
  if (!ascending) {
    std::sort(unit, unit + n);
    n = int(std::unique(unit, unit + n) - unit);
  }
  for (int i = 0; i < n; i++) f(unit[i]);
  return n;
}

// Updates the shadow of one lane's bytes. Bit 0 of the result: an uninitialised byte was read; bit 1: a byte
// had been written in this launch; bit 2: a byte is pending.
template <class W>
inline int mark(u8* shadow, int size, int flags) {
  const W ones = W(0x0101010101010101ull);
  bool uninitialised = false;
  W before = 0;
  for (int i = 0; i < size; i += int(sizeof(W))) {
    W x;
    std::memcpy(&x, shadow + i, sizeof(W));
    before |= x;
    uninitialised |= (x & W(ones * kUninitialised)) != 0;
    if (flags & kRead) x |= W(ones * kWasRead);
    if (flags & kWrite) x = W((x | W(ones * kWasWritten)) & ~W(ones * kUninitialised));
    std::memcpy(shadow + i, &x, sizeof(W));
  }
  return int(uninitialised && flags & kRead) | (before & W(ones * kWasWritten) ? 2 : 0) |
         (before & W(ones * kPending) ? 4 : 0);
}

inline int mark_any(u8* shadow, int size, int flags) {
  switch (size) {
    case 1:
      return mark<u8>(shadow, 1, flags);
    case 2:
      return mark<u16>(shadow, 2, flags);
    case 4:
      return mark<u32>(shadow, 4, flags);
    case 8:
      return mark<u64>(shadow, 8, flags);
    case 16:
      return mark<u64>(shadow, 16, flags);
    default:
      return mark<u64>(shadow, size, flags);
  }
}

Allocation& checked_allocation(Context& c, int lane, u64 address, u32 size, int flags, const char* what) {
  Allocation* a = find_allocation(*c.machine, address);
  if (!a || address + size > a->base + a->size)
    fault(c, lane,
          format("out-of-bounds global %s of %u bytes%s at address 0x%llx (%s)",
                 flags & kWrite ? "write" : "read", size, what, (unsigned long long)address,
                 describe_address(*c.machine, a ? address + size - 1 : address).c_str()));
  if (a->kind != kReadWrite && flags & kWrite) fault(c, lane, "write to read-only (const/param) memory");
  return *a;
}

void report_uninitialised(Context& c, int lane, const Allocation& a, u64 address) {
  report(c, ReportKind::UninitGlobal, lane, 0,
         format("read of uninitialised global memory at %s + %llu", buffer_name(a).c_str(),
                (unsigned long long)(address - a.base)));
}

// Before griddepcontrol.wait a dependent launch may read only what no launch before it wrote, and write
// nothing.
void check_wait(Context& c, int lane, const Allocation& a, u64 address, int flags, bool pending) {
  if (!c.machine->dependent || c.warp->sync.waited || a.kind != kReadWrite) return;
  if (!(flags & kWrite) && !pending) return;
  report(c, ReportKind::BeforeWait, lane, 0,
         format("%s of %s + %llu%s before griddepcontrol.wait", flags & kWrite ? "write" : "read",
                buffer_name(a).c_str(), (unsigned long long)(address - a.base),
                flags & kWrite ? "" : ", which a launch before this one wrote,"));
}

}  // namespace

void count_global_request(Context& c, const u64* address, u32 mask, int size) {
  c.counters->requests++;
  c.counters->sectors += distinct_units(address, mask, size, 5, [](u64) {});
  c.counters->bytes += u64(__builtin_popcount(mask)) * size;
  if (L2Model* l2 = c.machine->l2) {
    Op op = c.machine->program[c.pc].op;
    bool write = op == Op::St || op == Op::Red || op == Op::Atom || op == Op::WmmaStore;
    distinct_units(address, mask, size, 7, [&](u64 line) { l2->access(line, write); });
  }
}

void global_access(Context& c, const u64* address, u32 mask, int size, int flags, u8** pointer) {
  if (!mask) return;
  Allocation* a = nullptr;
  for (u32 left = mask; left; left &= left - 1) {
    int l = first_lane(left);
    u64 x = address[l];
    if (x & (size - 1))
      fault(c, l,
            format("misaligned %d-byte %s at address 0x%llx", size, flags & kWrite ? "store/atomic" : "load",
                   (unsigned long long)x));
    if (!a || x < a->base || x + size > a->base + a->size) a = &checked_allocation(c, l, x, size, flags, "");
    u64 offset = x - a->base;
    pointer[l] = reinterpret_cast<u8*>(a->host) + offset;
    int seen = mark_any(reinterpret_cast<u8*>(a->shadow) + offset, size, flags);
    check_wait(c, l, *a, x, flags, seen & 4);
    if (flags & (kThroughL1 | kNonCoherent)) check_l1(c, *a, x, size, l, flags);
    if (a->readers) check_global_order(c, *a, x, size, l, flags, c.warp->agent, seen & 2);
    if (seen & 1) report_uninitialised(c, l, *a, x);
  }
  if (!(flags & kUncounted)) count_global_request(c, address, mask, size);
}

u8* global_range(Context& c, int lane, u64 address, u32 bytes, int flags, int agent) {
  Allocation& a = checked_allocation(c, lane, address, bytes, flags, " in a bulk copy");
  u64 offset = address - a.base;
  u8* shadow = reinterpret_cast<u8*>(a.shadow) + offset;
  bool uninitialised = false;
  for (u32 done = 0; done < bytes;) {  // pieces that do not cross a multiple of 16
    int n = int(std::min<u64>(bytes - done, 16 - ((address + done) & 15)));
    int seen = 0;
    for (int i = 0; i < n; i++) seen |= mark<u8>(shadow + done + i, 1, flags);
    check_wait(c, lane, a, address + done, flags, seen & 4);
    if (a.readers) check_global_order(c, a, address + done, n, lane, flags, agent, seen & 2);
    if (seen & 1 && !uninitialised) {
      report_uninitialised(c, lane, a, address + done);
      uninitialised = true;
    }
    done += n;
  }
  return reinterpret_cast<u8*>(a.host) + offset;
}

}  // namespace ptxsim
