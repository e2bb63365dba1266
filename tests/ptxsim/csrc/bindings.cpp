// The Python module. It knows programs and launches; everything of PTX text and of tensors is Python's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "l2_model.hpp"
#include "scheduler.hpp"

namespace py = pybind11;
using namespace ptxsim;

namespace {

template <class T>
std::vector<T> to_vector(const py::array_t<T, py::array::c_style>& a) {
  return std::vector<T>(a.data(), a.data() + a.size());
}

std::unique_ptr<Machine> make_machine(const py::array_t<Instruction, py::array::c_style>& program,
                                      const py::array_t<s32, py::array::c_style>& operands,
                                      const py::array_t<u64, py::array::c_style>& constants,
                                      u32 register_bytes, u32 local_bytes,
                                      const std::vector<std::pair<s32, s32>>& special, u32 entry) {
  auto m = std::make_unique<Machine>();
  m->program = to_vector(program);
  m->operands = to_vector(operands);
  m->register_bytes = register_bytes;
  m->local_bytes = local_bytes;
  m->special_registers = special;
  m->entry = entry;
  m->handlers.resize(m->program.size());
  m->classes.resize(m->program.size());
  for (size_t i = 0; i < m->program.size(); i++)
    m->handlers[i] = resolve_handler(m->program[i], m->classes[i]);
  // Each constant (value in 32-bit slots, value in 64-bit slots) is spread over the lanes, 64-byte aligned.
  size_t n = size_t(constants.size()) / 2;
  m->constants.resize(n * kConstantBytes + 64);
  auto start = reinterpret_cast<uintptr_t>(m->constants.data());
  u8* aligned = m->constants.data() + (-start & 63);
  for (size_t i = 0; i < n; i++) {
    auto* narrow = reinterpret_cast<u32*>(aligned + i * kConstantBytes);
    auto* wide = reinterpret_cast<u64*>(aligned + i * kConstantBytes + 128);
    std::fill_n(narrow, 32, u32(constants.data()[2 * i]));
    std::fill_n(wide, 32, constants.data()[2 * i + 1]);
  }
  m->aligned_constants = aligned;
  return m;
}

s64 first_unknown(const Machine& m) {
  for (size_t i = 0; i < m.handlers.size(); i++)
    if (!m.handlers[i]) return s64(i);
  return -1;
}

void reset(Machine& m) {
  m.counters.assign(m.program.size(), Counters{});
  m.reports.clear();
  m.report_index.clear();
  m.output.clear();
  m.instructions = m.blocks_done = m.barriers = m.progress = 0;
  m.trips_before = m.trips_after = 0;
  m.last_allocation = 0;
  m.write_records.assign(1, WriteRecord{});  // number 0: nobody
  m.snapshots.clear();
  m.released.clear();
}

// Returns the fault's text, or None.
py::object run(Machine& m, std::array<u32, 3> grid, std::array<u32, 3> block,
               std::optional<std::array<u32, 3>> cluster, u32 shared_bytes,
               const py::array_t<Allocation, py::array::c_style>& allocations, bool races, bool strict,
               u64 max_instructions, u32 seed, int resident, const std::vector<u32>& order,
               double approx_error, L2Model* l2, bool count_trips, bool dependent) {
  std::copy_n(grid.begin(), 3, m.grid);
  std::copy_n(block.begin(), 3, m.block_dim);
  m.explicit_cluster = cluster.has_value();
  std::array<u32, 3> blocks = cluster.value_or(std::array<u32, 3>{1, 1, 1});
  std::copy_n(blocks.begin(), 3, m.cluster_dim);
  m.cluster_blocks = blocks[0] * blocks[1] * blocks[2];
  m.clustered =
      m.cluster_blocks > 1 || std::any_of(m.program.begin(), m.program.end(),
                                          [](const Instruction& in) { return in.op == Op::ClusterArrive; });
  m.shared_bytes = shared_bytes;
  m.allocations = to_vector(allocations);
  m.races = races;
  m.strict = strict;
  m.max_instructions = max_instructions;
  m.seed = seed;
  m.approx_error = approx_error;
  m.l2 = l2;
  m.count_trips = count_trips;
  m.dependent = dependent;
  m.poll_signals = [] {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals()) throw py::error_already_set();
  };
  reset(m);
  try {
    py::gil_scoped_release unlocked;
    run_grid(m, {resident, order});
  } catch (const Fault& f) {
    return py::str(f.what());
  }
  return py::none();
}

py::list reports(const Machine& m) {
  static const char* kinds[] = {
#define X(name, text) text,
      PTXSIM_REPORT_KINDS(X)
#undef X
  };
  py::list out;
  for (const Report& r : m.reports)
    out.append(py::make_tuple(kinds[int(r.kind)], m.program[r.pc].line,
                              py::make_tuple(r.block[0], r.block[1], r.block[2]),
                              py::make_tuple(r.thread[0], r.thread[1], r.thread[2]), r.count, r.message));
  return out;
}

template <class E>
py::dict name_table(std::initializer_list<std::pair<const char*, E>> entries) {
  py::dict table;
  for (auto& [name, value] : entries) table[name] = u64(value);
  return table;
}

}  // namespace

PYBIND11_MODULE(PTXSIM_MODULE, module) {
  PYBIND11_NUMPY_DTYPE(Instruction, op, type, type2, guard, guard_negated, n_dst, n_src, vec, target, line,
                       operands, aux, mods, imm, imm2);
  PYBIND11_NUMPY_DTYPE(Allocation, base, size, host, shadow, writes, readers, kind, id);
  PYBIND11_NUMPY_DTYPE(Counters, executed, lanes, requests, sectors, bytes, wavefronts, ideal_wavefronts,
                       delivered);

#define X(name) {#name, Op::name},
  module.attr("OPCODES") = name_table<Op>({PTXSIM_OPCODES(X)});
#undef X
#define X(name) {#name, Type::name},
  module.attr("TYPES") = name_table<Type>({PTXSIM_TYPES(X)});
#undef X
#define X(name, bit) {#name, 1ull << bit},
  module.attr("MODIFIERS") = name_table<u64>({PTXSIM_MODIFIERS(X)});
#undef X
  module.attr("COMPARE_SHIFT") = mod::kCompareShift;
  module.attr("BOOL_SHIFT") = mod::kBoolShift;
  module.attr("ROUNDING_SHIFT") = mod::kRoundingShift;
  module.attr("SPACE_SHIFT") = mod::kSpaceShift;
  module.attr("SHARED_WINDOW") = kSharedWindow;
  module.attr("LOCAL_WINDOW") = kLocalWindow;
  module.attr("MAX_CLUSTER_BLOCKS") = kMaxClusterBlocks;
  module.attr("READ_RECORD_BYTES") = sizeof(ReadRecord);
  module.attr("INSTRUCTION") = py::dtype::of<Instruction>();
  module.attr("ALLOCATION") = py::dtype::of<Allocation>();

  py::class_<L2Model>(module, "L2Model")
      .def(py::init<u64>())
      .def("reset_counters", &L2Model::reset_counters)
      .def_property_readonly("capacity", &L2Model::capacity)
      .def_property_readonly("dirty_lines", &L2Model::dirty_lines)
      .def_readonly("lines_requested", &L2Model::lines_requested)
      .def_readonly("hits", &L2Model::hits)
      .def_readonly("lines_fetched", &L2Model::lines_fetched)
      .def_readonly("lines_written_back", &L2Model::lines_written_back);

  py::class_<Machine>(module, "Machine")
      .def(py::init(&make_machine))
      .def("first_unknown", &first_unknown)
      .def("run", &run)
      .def("reports", &reports)
      .def_property_readonly("counters",
                             [](const Machine& m) {
                               return py::array_t<Counters>(py::ssize_t(m.counters.size()),
                                                            m.counters.data());
                             })
      .def_readonly("instructions", &Machine::instructions)
      .def_readonly("blocks_done", &Machine::blocks_done)
      .def_readonly("barriers", &Machine::barriers)
      .def_readonly("trips_before", &Machine::trips_before)
      .def_readonly("trips_after", &Machine::trips_after)
      .def_property_readonly("output", [](const Machine& m) { return py::bytes(m.output); });
}
