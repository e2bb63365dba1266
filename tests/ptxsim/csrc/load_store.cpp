// ld, st and fences, and the resolution of addresses to spaces.
#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

constexpr int kUpperHalf = 256;  // of a 128-bit register

u8* local_pointer(Context& c, int lane, u64 address, int size) {
  u64 limit = c.machine->local_bytes;
  if (address & (size - 1)) fault(c, lane, format("misaligned %d-byte local access", size));
  if (address + size > limit)
    fault(c, lane,
          format("out-of-bounds local access at byte %llu (thread has %llu)", (unsigned long long)address,
                 (unsigned long long)limit));
  return c.warp->local + size_t(lane) * limit + address;
}

void resolve_shared(Context& c, const u64* address, u32 mask, int size, int flags, u8** pointer) {
  u32 offset[32], elsewhere = 0;
  SharedPlace place[32];
  for (int l = 0; l < 32; l++) {
    offset[l] = u32(address[l]);
    if (!(mask >> l & 1)) continue;
    if (address[l] >> 32 && address[l] >> 32 != kSharedWindow >> 32)
      fault(c, l, format("shared access with a bad address 0x%llx", (unsigned long long)address[l]));
    if (rank_of(c, offset[l]) == c.block->rank) continue;
    place[l] = shared_place(c, l, offset[l]);
    elsewhere |= 1u << l;
  }
  shared_access(c, offset, mask & ~elsewhere, size, flags, pointer);
  if (elsewhere) remote_access(c, place, elsewhere, size, flags, pointer);
}

void resolve_local(Context& c, const u64* address, u32 mask, int size, u8** pointer) {
  for_lanes(mask, [&](int l) { pointer[l] = local_pointer(c, l, address[l] & ~kLocalWindow, size); });
}

u64 load_element(const u8* from, int size, bool sign) {
  u64 value = 0;
  std::memcpy(&value, from, size);
  if (sign && size < 8) value = u64(s64(value << (64 - 8 * size)) >> (64 - 8 * size));
  return value;
}

void load_register(Context& c, s32 dst, u8* const* pointer, int offset, int size, bool sign) {
  if (size == 16) {
    for_lanes(c.mask, [&](int l) {
      for (int half = 0; half < 2; half++)
        set_lane(c, dst + half * kUpperHalf, l, load_element(pointer[l] + offset + 8 * half, 8, false));
    });
  } else if (!is_wide(dst) && size == 4) {
    u32* regs = slots_of_register<u32>(c, dst);
    for_lanes(c.mask, [&](int l) { std::memcpy(&regs[l], pointer[l] + offset, 4); });
  } else {
    for_lanes(c.mask, [&](int l) { set_lane(c, dst, l, load_element(pointer[l] + offset, size, sign)); });
  }
}

int access_flags(const Instruction& in) {
  if (in.has(mod::Strong)) return kStrongAccess;
  return in.has(mod::NonCoherent) ? kNonCoherent : in.has(mod::ThroughL1) ? kThroughL1 : 0;
}

// vec elements; sources: the address
void ld(Context& c, const Instruction& in) {
  u64 address[32];
  u8* pointer[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  int size = type_size(in.type);
  if (in.has(mod::Strong)) {
    c.block->polls++;
    for_lanes(c.mask, [&](int l) { synchronise(c, in, address[l], true, false); });
  }
  resolve(c, in.space(), address, c.mask, size * in.vec, kRead | access_flags(in), pointer);
  for (int i = 0; i < in.vec; i++)
    load_register(c, operand(c, in, i), pointer, size * i, size, is_signed(in.type));
}

// vec elements; sources: the address, then the values
void st(Context& c, const Instruction& in) {
  c.machine->progress++;
  u64 address[32];
  u8* pointer[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  int size = type_size(in.type);
  resolve(c, in.space(), address, c.mask, size * in.vec, kWrite | access_flags(in), pointer);
  if (in.has(mod::Strong)) for_lanes(c.mask, [&](int l) { synchronise(c, in, address[l], false, true); });
  for (int i = 0; i < in.vec; i++) {
    s32 src = source_code(c, in, 1 + i);
    int parts = size == 16 ? 2 : 1, part = size / parts;
    for (int half = 0; half < parts; half++) {
      s32 code = src + half * kUpperHalf;
      int offset = size * i + 8 * half;
      if (part == 8 || is_wide(code)) {
        auto values = slots<u64>(c, code);
        for_lanes(c.mask, [&](int l) { std::memcpy(pointer[l] + offset, &values[l], part); });
      } else {
        auto values = slots<u32>(c, code);
        for_lanes(c.mask, [&](int l) { std::memcpy(pointer[l] + offset, &values[l], part); });
      }
    }
  }
}

// A fence makes what the warp has seen visible to other blocks and completes its relaxed reads to acquires.
void fence(Context& c, const Instruction& in) {
  if (!c.machine->races) return;
  if (in.has(mod::MbarrierInit)) {
    for (auto& [address, bar] : c.block->mbarriers) bar.init_fenced |= bar.init_agent == c.warp->agent;
    return;
  }
  if (in.has(mod::GpuScope)) fence_gpu(c);
  if (c.machine->clustered && in.has(mod::ClusterScope)) c.warp->sync.cluster_fenced.join(view_of(c));
  if (in.has(mod::GpuScope) || in.has(mod::ClusterScope)) advance_clock(*c.block);
}

void proxy_fence(Context& c, const Instruction&) {
  c.warp->sync.proxied.join(view_of(c));
  advance_clock(*c.block);
}

}  // namespace

void resolve(Context& c, Space space, const u64* address, u32 mask, int size, int flags, u8** pointer) {
  switch (space) {
    case Space::Shared:
      return resolve_shared(c, address, mask, size, flags, pointer);
    case Space::Local:
      return resolve_local(c, address, mask, size, pointer);
    case Space::Global:
      return global_access(c, address, mask, size, flags, pointer);
    case Space::Const:
      return global_access(c, address, mask, size, flags | kUncounted, pointer);
    default:
      break;
  }
  u32 shared = 0, local = 0;
  for_lanes(mask, [&](int l) {
    u64 window = address[l] >> 48;
    if (window == kSharedWindow >> 48) shared |= 1u << l;
    if (window == kLocalWindow >> 48) local |= 1u << l;
  });
  if (shared) resolve_shared(c, address, shared, size, flags, pointer);
  if (local) resolve_local(c, address, local, size, pointer);
  int extra = space == Space::Param ? kUncounted : 0;
  global_access(c, address, mask & ~shared & ~local, size, flags | extra, pointer);
}

Handler memory_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Ld:
      return ld;
    case Op::St:
      return st;
    case Op::Fence:
      return fence;
    case Op::ProxyFence:
      return proxy_fence;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
