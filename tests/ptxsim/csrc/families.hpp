// One entry point per instruction family: the handler of an instruction, or null if it is not of the family.
#pragma once
#include "machine.hpp"

namespace ptxsim {

Handler integer_handler(const Instruction& in);
Handler bits_handler(const Instruction& in);
Handler float_handler(const Instruction& in);
Handler transcendental_handler(const Instruction& in);
Handler compare_handler(const Instruction& in);
Handler move_handler(const Instruction& in);
Handler convert_handler(const Instruction& in);
Handler memory_handler(const Instruction& in);
Handler atomic_handler(const Instruction& in);
Handler cp_async_handler(const Instruction& in);
Handler mbarrier_handler(const Instruction& in);
Handler bulk_copy_handler(const Instruction& in);
Handler matrix_load_handler(const Instruction& in);
Handler mma_handler(const Instruction& in);
Handler wmma_handler(const Instruction& in);
Handler wgmma_handler(const Instruction& in);
Handler warp_handler(const Instruction& in);
Handler cluster_handler(const Instruction& in);
Handler system_handler(const Instruction& in);

}  // namespace ptxsim
