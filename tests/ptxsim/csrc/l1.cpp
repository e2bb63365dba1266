// Loads that L1 may answer with what a line held when the block first loaded it.
#include "memory.hpp"

namespace ptxsim {

namespace {

std::string place(const Allocation& a, u64 address) {
  return format("%s + %llu", a.id >= 0 ? format("buffer #%d", a.id).c_str() : "a buffer",
                (unsigned long long)(address - a.base));
}

// The first of the bytes that another block wrote after `since`; the whole size if there is none.
int written_since(const Context& c, const Allocation& a, u64 address, int size, u64 since) {
  const u32* owner = reinterpret_cast<const u32*>(a.writes) + (address - a.base);
  for (int i = 0; i < size; i++) {
    const WriteRecord& w = c.machine->write_records[owner[i]];
    if (!owner[i] || w.time <= since) continue;
    if (w.cluster != c.block->cluster->number || !c.block->owns(w.agent)) return i;
  }
  return size;
}

}  // namespace

// An access lies within a line of 128 bytes, or is one of 32 aligned bytes.
void check_l1(Context& c, Allocation& a, u64 address, int size, int lane, int flags) {
  if (!a.writes) return;  // constant, or no checks
  Block& b = *c.block;
  const Machine& m = *c.machine;
  const u8* shadow = reinterpret_cast<const u8*>(a.shadow) + (address - a.base);
  if (flags & kNonCoherent) {
    for (int i = 0; i < size; i++)
      if (shadow[i] & kWasWritten) {
        report(c, ReportKind::StaleL1, lane, 0,
               place(a, address + i) + " is loaded by ld.global.nc, and this launch writes it");
        break;
      }
  }
  auto& lines = flags & kNonCoherent ? b.non_coherent : b.l1;
  auto [line, fresh] = lines.try_emplace(address >> 7, m.instructions, m.dependent && !c.warp->sync.waited);
  if (fresh) return;
  auto [since, before_wait] = line->second;
  if (int i = written_since(c, a, address, size, since); i < size) {
    report(c, ReportKind::StaleL1, lane, 0,
           place(a, address + i) +
               ", which another block has written, is loaded through L1, where this block "
               "keeps the line from before, and has acquired nothing since");
    return;
  }
  if (!before_wait) return;
  for (int i = 0; i < size; i++)
    if (shadow[i] & kPending) {
      report(c, ReportKind::StaleL1, lane, 0,
             place(a, address + i) +
                 ", which a launch before this one wrote, is loaded through L1, where this "
                 "block keeps the line from before griddepcontrol.wait");
      return;
    }
}

}  // namespace ptxsim
