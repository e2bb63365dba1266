// From a decoded instruction to its handler.
#include "families.hpp"
#include "scheduler.hpp"

namespace ptxsim {

Handler resolve_handler(const Instruction& in, u8& lane_class) {
  lane_class = kIndependent;
  switch (in.op) {
    case Op::Bra:
    case Op::Brx:
    case Op::Call:
    case Op::Ret:
    case Op::Exit:
    case Op::Bar:
    case Op::BarWarp:
    case Op::ClusterWait:
      lane_class = kControl;  // the scheduler's own
      return [](Context&, const Instruction&) {};
    case Op::Shfl:
    case Op::Vote:
    case Op::Match:
    case Op::Redux:
    case Op::Elect:
      lane_class = kMembers;
      break;
    case Op::Ldmatrix:
    case Op::Stmatrix:
    case Op::Movmatrix:
    case Op::Mma:
    case Op::WmmaLoad:
    case Op::WmmaStore:
    case Op::WmmaMma:
    case Op::Wgmma:
    case Op::WgmmaFence:
    case Op::WgmmaCommit:
    case Op::WgmmaWait:
      lane_class = kWholeWarp;
      break;
    case Op::ClusterArrive:
      if (in.has(mod::Aligned)) lane_class = kWholeWarp;
      break;
    default:
      break;
  }
  static constexpr Handler (*kFamilies[])(const Instruction&) = {
      integer_handler,     bits_handler,     float_handler,    transcendental_handler,
      compare_handler,     move_handler,     convert_handler,  memory_handler,
      atomic_handler,      cp_async_handler, mbarrier_handler, bulk_copy_handler,
      matrix_load_handler, mma_handler,      wmma_handler,     wgmma_handler,
      warp_handler,        cluster_handler,  system_handler,
  };
  for (auto family : kFamilies)
    if (Handler handler = family(in)) return handler;
  return nullptr;
}

}  // namespace ptxsim
