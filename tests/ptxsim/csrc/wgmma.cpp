// wgmma.mma_async. It is executed by the wait for its group, so that neither its operands nor its results can
// be used earlier without the result showing it. Each warp computes its 16 rows of the 64.
#include "families.hpp"
#include "matrix_math.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

// Instruction::imm2
struct Options {
  int k;
  bool a_in_registers, negate_a, negate_b, transpose_a, transpose_b;
  explicit Options(const Instruction& in)
      : k(in.imm2 & 255),
        a_in_registers(in.imm2 >> 8 & 1),
        negate_a(in.imm2 >> 9 & 1),
        negate_b(in.imm2 >> 10 & 1),
        transpose_a(in.imm2 >> 11 & 1),
        transpose_b(in.imm2 >> 12 & 1) {}
};

// A matrix descriptor: where 16-byte pieces of an operand lie in shared memory.
struct Descriptor {
  u32 start, leading, stride, width, swizzle;

  explicit Descriptor(u64 d)
      : start(u32(d & 0x3fff) << 4), leading(u32(d >> 16 & 0x3fff) << 4), stride(u32(d >> 32 & 0x3fff) << 4) {
    int mode = d >> 62 & 3;  // 0 none, 1: 128 bytes, 2: 64, 3: 32
    width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
    swizzle = width / 16 - 1;
  }
  u32 swizzled(u32 a) const { return a ^ ((a >> 7 & swizzle) << 4); }

  // Piece `piece` (16 bytes along k) of row `row` of an operand whose rows are contiguous along k
  u32 k_major(int row, int piece) const {
    u32 inner = swizzle ? piece * 16 + (row % 8) * width : piece * leading + (row % 8) * 16;
    return swizzled(start + (row / 8) * stride + inner);
  }
  // Piece `piece` (16 bytes along m or n) of column k of an operand that is contiguous along m or n
  u32 mn_major(int piece, int k) const {
    if (!swizzle) return start + piece * stride + (k / 8) * leading + (k % 8) * 16;
    u32 bytes = piece * 16;
    return swizzled(start + bytes / width * leading + (k / 8) * stride + (k % 8) * width + bytes % width);
  }
};

// Wavefronts of the 16-byte pieces of one operand, 8 at a time (modelled: hardware reads 8x16-byte core
// matrices).
class WavefrontCounter {
 public:
  explicit WavefrontCounter(Counters* counters) : counters_(counters) {}
  void add(u32 address) {
    busiest_ = std::max<int>(busiest_, ++bank_[address >> 4 & 7]);
    if (++pieces_ == 8) flush();
  }
  void flush() {
    if (!pieces_) return;
    counters_->wavefronts += busiest_;
    counters_->ideal_wavefronts++;
    counters_->bytes += 16 * pieces_;
    std::memset(bank_, 0, sizeof bank_);
    pieces_ = busiest_ = 0;
  }

 private:
  Counters* counters_;
  int bank_[8] = {}, pieces_ = 0, busiest_ = 0;
};

const u8* piece_pointer(Context& c, u32 address) {
  if (address + 16 > c.machine->shared_bytes)
    fault(c, 0, format("wgmma descriptor reaches shared byte %u, out of bounds", address));
  check_shared(c, *c.block, 0, address, 16, kRead | kAsyncProxy, c.warp->agent);
  check_proxy(c, 0, address, 16);
  return c.block->smem + address;
}

template <class T>
T element(Type type, const u8* piece, int e) {
  u32 reg = 0;
  int size = operand_size(type);
  std::memcpy(&reg, piece + e * size, size);
  if constexpr (std::is_same_v<T, s32>)
    return fragment_int(type, reg, 0);
  else
    return fragment_float(type, reg, 0);
}

// Reads `rows` rows from row `first` of an operand in shared memory; put(row, k, value).
template <class T, class F>
void read_operand(Context& c, u64 descriptor, Type type, int first, int rows, int k_size, bool mn_major,
                  bool counted, F put) {
  if (descriptor >> 49 & 7) fault(c, 0, "wgmma descriptors with a base offset are not supported");
  Descriptor d(descriptor);
  Counters uncounted{};
  WavefrontCounter wavefronts(counted ? c.counters : &uncounted);
  int per_piece = 16 / operand_size(type);
  if (!mn_major) {
    for (int piece = 0; piece < k_size / per_piece; piece++)
      for (int row = 0; row < rows; row++) {
        u32 address = d.k_major(first + row, piece);
        const u8* p = piece_pointer(c, address);
        wavefronts.add(address);
        for (int e = 0; e < per_piece; e++) put(row, piece * per_piece + e, element<T>(type, p, e));
      }
  } else {
    for (int piece = 0; piece < rows / per_piece; piece++)
      for (int k = 0; k < k_size; k++) {
        u32 address = d.mn_major(first / per_piece + piece, k);
        const u8* p = piece_pointer(c, address);
        wavefronts.add(address);
        for (int e = 0; e < per_piece; e++) put(piece * per_piece + e, k, element<T>(type, p, e));
      }
  }
  wavefronts.flush();
}

template <class T>
void read_a(Context& c, const Instruction& in, const Options& o, const WgmmaCall& call, std::vector<T>& A) {
  if (!o.a_in_registers) {
    int first = 16 * (c.warp->id & 3);
    read_operand<T>(c, call.desc_a, in.type, first, 16, o.k, o.transpose_a, true,
                    [&](int row, int k, T x) { A[row * o.k + k] = x; });
    return;
  }
  int per = elements_per_register(in.type);
  for (int i = 0; i < 4; i++) {
    const u32* regs = slots<u32>(c, source_code(c, in, i));
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < per; e++) {
        int row = (l >> 2) + 8 * (i & 1), k = 4 * per * (i >> 1) + per * (l & 3) + e;
        if constexpr (std::is_same_v<T, s32>)
          A[row * o.k + k] = fragment_int(in.type, regs[l], e);
        else
          A[row * o.k + k] = fragment_float(in.type, regs[l], e);
      }
  }
}

template <class T>
void read_operands(Context& c, const Instruction& in, const Options& o, const WgmmaCall& call,
                   std::vector<T>& A, std::vector<T>& B) {
  const int N = in.aux;
  read_a(c, in, o, call, A);
  bool counted = (c.warp->id & 3) == 0;  // B is read once for the four warps
  read_operand<T>(c, call.desc_b, in.type2, 0, N, o.k, o.transpose_b, counted,
                  [&](int n, int k, T x) { B[k * N + n] = x; });
}

// Accumulators: registers hold columns 8j + 2(l%4) + {0, 1} of rows l/4 and l/4 + 8.
int result_index(int lane, int i, int N) {
  return tile_row(lane, i & 3) * N + 8 * (i >> 2) + tile_column(lane, i & 1);
}

void execute_float(Context& c, const Instruction& in, const WgmmaCall& call) {
  Options o(in);
  const int N = in.aux, K = o.k;
  bool half = static_cast<Type>(in.imm) == Type::F16;
  static thread_local std::vector<float> A, B, D;
  A.resize(16 * K), B.resize(K * N), D.resize(16 * N);
  read_operands(c, in, o, call, A, B);
  float sign = o.negate_a != o.negate_b ? -1.f : 1.f;
  auto index16 = [&](int l, int i, int h) {
    return tile_row(l, 2 * (i & 1)) * N + 8 * (i >> 1) + 2 * (l & 3) + h;
  };
  for (int i = 0; i < in.n_dst; i++) {
    const u32* regs = slots<u32>(c, operand(c, in, i));
    for (int l = 0; l < 32; l++) {
      if (half)
        for (int h = 0; h < 2; h++)
          D[index16(l, i, h)] = call.scale_d ? half_to_float(u16(regs[l] >> 16 * h)) : 0.f;
      else
        D[result_index(l, i, N)] = call.scale_d ? bits_float(regs[l]) : 0.f;
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++) {
      float x = sign * A[row * K + k];
      float* d = &D[row * N];
      const float* b = &B[k * N];
      for (int n = 0; n < N; n++) d[n] = __builtin_fmaf(x, b[n], d[n]);
    }
  for (int i = 0; i < in.n_dst; i++)
    write<u32>(c, in, i, [&](int l) {
      if (!half) return float_bits(D[result_index(l, i, N)]);
      return float_to_half(D[index16(l, i, 0)]) | u32(float_to_half(D[index16(l, i, 1)])) << 16;
    });
}

void execute_int8(Context& c, const Instruction& in, const WgmmaCall& call) {
  Options o(in);
  const int N = in.aux, K = o.k;
  std::vector<s32> A(16 * K), B(K * N);
  read_operands(c, in, o, call, A, B);
  for (int i = 0; i < in.n_dst; i++) {
    const u32* regs = slots<u32>(c, operand(c, in, i));
    u32 out[32];
    for (int l = 0; l < 32; l++) {
      int at = result_index(l, i, N), row = at / N, n = at % N;
      s64 sum = 0;
      for (int k = 0; k < K; k++) sum += s64(A[row * K + k]) * B[k * N + n];
      out[l] = u32(add_products(call.scale_d ? s32(regs[l]) : 0, sum, in.has(mod::SatFinite)));
    }
    store_slots<u32>(c, operand(c, in, i), out);
  }
}

// Destinations: the accumulators. Sources: A (4 registers or a descriptor), descriptor of B, scale-d. aux: n
void wgmma(Context& c, const Instruction& in) {
  Options o(in);
  WgmmaCall call;
  call.pc = c.pc;
  call.group = c.warp->wgmma_groups;
  int b = o.a_in_registers ? 4 : 1;
  call.desc_a = o.a_in_registers ? 0 : lane_source(c, in, 0, 0);
  call.desc_b = lane_source(c, in, b, 0);
  call.scale_d = predicate_source(c, in, b + 1) & 1;
  c.warp->wgmma.push_back(call);
}

void commit(Context& c, const Instruction&) { c.warp->wgmma_groups++; }

void wait(Context& outer, const Instruction& in) {
  auto& queue = outer.warp->wgmma;
  size_t n = 0;
  for (; n < queue.size() && queue[n].group + u32(in.imm) < outer.warp->wgmma_groups; n++) {
    Context c = outer;
    c.pc = queue[n].pc;
    c.counters = &c.machine->counters[c.pc];
    c.mask = ~0u;
    const Instruction& call = c.machine->program[c.pc];
    if (is_int8(call.type))
      execute_int8(c, call, queue[n]);
    else
      execute_float(c, call, queue[n]);
  }
  queue.erase(queue.begin(), queue.begin() + s64(n));
}

void nothing(Context&, const Instruction&) {}

}  // namespace

Handler wgmma_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Wgmma:
      return wgmma;
    case Op::WgmmaCommit:
      return commit;
    case Op::WgmmaWait:
      return wait;
    case Op::WgmmaFence:
      return nothing;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
