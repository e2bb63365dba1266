// wmma. Fragments are opaque in PTX, so they have a layout of our own: row-major over the warp, each lane
// holding consecutive elements. (Half-precision A and B fragments on hardware hold every element twice; the
// surplus registers repeat the others.)
#include "families.hpp"
#include "matrix_math.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

struct Shape {
  int rows, columns, size, per_lane, per_register;
  Shape(const Instruction& in)
      : rows(in.aux & 255),
        columns(in.aux >> 8),
        size(type_size(in.type)),
        per_lane(rows * columns / 32),
        per_register(4 / size) {}

  // The address of element e of each lane; columns lie `stride` elements apart if transposed, else rows do.
  void element_addresses(Context& c, const Instruction& in, int e, const u64* base, s32 stride,
                         u64* out) const {
    for (int l = 0; l < 32; l++) {
      int linear = l * per_lane + e;
      u64 row = linear / columns, column = linear % columns, step = lane_value(c, stride, l);
      out[l] = base[l] + size * (in.has(mod::Transposed) ? column * step + row : row * step + column);
    }
  }
};

// aux: rows | columns << 8. Sources: address, stride
void load(Context& c, const Instruction& in) {
  Shape shape(in);
  u64 base[32];
  addresses(c, source_code(c, in, 0), in.imm, base);
  u32 registers[16][32] = {};
  u64 requests = c.counters->requests;
  for (int e = 0; e < shape.per_lane; e++) {
    u64 address[32];
    u8* pointer[32];
    shape.element_addresses(c, in, e, base, source_code(c, in, 1), address);
    resolve(c, in.space(), address, c.mask, shape.size, kRead, pointer);
    for (int l = 0; l < 32; l++) {
      u32 value = 0;
      std::memcpy(&value, pointer[l], shape.size);
      registers[e / shape.per_register][l] |= value << 8 * shape.size * (e % shape.per_register);
    }
  }
  c.counters->requests = requests + 1;
  int used = shape.per_lane / shape.per_register;
  for (int i = 0; i < in.n_dst; i++) store_slots<u32>(c, operand(c, in, i), registers[i % used]);
}

// Sources: address, registers, stride
void store(Context& c, const Instruction& in) {
  Shape shape(in);
  u64 base[32];
  addresses(c, source_code(c, in, 0), in.imm, base);
  u64 requests = c.counters->requests;
  for (int e = 0; e < shape.per_lane; e++) {
    u64 address[32];
    u8* pointer[32];
    shape.element_addresses(c, in, e, base, source_code(c, in, in.n_src - 1), address);
    resolve(c, in.space(), address, c.mask, shape.size, kWrite, pointer);
    const u32* values = slots<u32>(c, source_code(c, in, 1 + e / shape.per_register));
    for (int l = 0; l < 32; l++) {
      u32 value = values[l] >> 8 * shape.size * (e % shape.per_register);
      std::memcpy(pointer[l], &value, shape.size);
    }
  }
  c.counters->requests = requests + 1;
}

// aux: m | n << 8 | k << 16; vec, target: registers of A and of B; imm, imm2: types of D and C
struct Product {
  int M, N, K, n_a, n_b;
  Product(const Instruction& in)
      : M(in.aux & 255), N(in.aux >> 8 & 255), K(in.aux >> 16 & 255), n_a(in.vec), n_b(in.target) {}

  template <class T, class F>
  void read(Context& c, const Instruction& in, std::vector<T>& out, int first, int per_register, F f) const {
    int per_lane = int(out.size()) / 32;
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < per_lane; e++)
        out[l * per_lane + e] =
            f(slots<u32>(c, source_code(c, in, first + e / per_register))[l], e % per_register);
  }
};

void mma_float(Context& c, const Instruction& in) {
  Product p(in);
  auto type_d = static_cast<Type>(in.imm), type_c = static_cast<Type>(in.imm2);
  std::vector<float> A(p.M * p.K), B(p.K * p.N), C(p.M * p.N);
  int per = elements_per_register(in.type);
  auto element = [&](u32 reg, int e) { return fragment_float(in.type, reg, e); };
  p.read(c, in, A, 0, per, element);
  p.read(c, in, B, p.n_a, per, element);
  p.read(c, in, C, p.n_a + p.n_b, type_c == Type::F16 ? 2 : 1, [&](u32 reg, int e) {
    return type_c == Type::F16 ? half_to_float(u16(reg >> 16 * e)) : bits_float(reg);
  });
  for (int row = 0; row < p.M; row++)
    for (int k = 0; k < p.K; k++)
      for (int n = 0; n < p.N; n++)
        C[row * p.N + n] = std::fma(A[row * p.K + k], B[k * p.N + n], C[row * p.N + n]);
  int per_lane = p.M * p.N / 32;
  for (int i = 0; i < in.n_dst; i++)
    write<u32>(c, in, i, [&](int l) {
      const float* lane = &C[l * per_lane];
      if (type_d != Type::F16) return float_bits(lane[i]);
      return float_to_half(lane[2 * i]) | u32(float_to_half(lane[2 * i + 1])) << 16;
    });
}

void mma_int8(Context& c, const Instruction& in) {
  Product p(in);
  std::vector<s32> A(p.M * p.K), B(p.K * p.N), C(p.M * p.N);
  p.read(c, in, A, 0, 4, [&](u32 reg, int e) { return fragment_int(in.type, reg, e); });
  p.read(c, in, B, p.n_a, 4, [&](u32 reg, int e) { return fragment_int(in.type2, reg, e); });
  p.read(c, in, C, p.n_a + p.n_b, 1, [](u32 reg, int) { return s32(reg); });
  for (int row = 0; row < p.M; row++)
    for (int n = 0; n < p.N; n++) {
      s64 sum = 0;
      for (int k = 0; k < p.K; k++) sum += s64(A[row * p.K + k]) * B[k * p.N + n];
      C[row * p.N + n] = add_products(C[row * p.N + n], sum, in.has(mod::SatFinite));
    }
  int per_lane = p.M * p.N / 32;
  for (int i = 0; i < in.n_dst; i++) write<u32>(c, in, i, [&](int l) { return u32(C[l * per_lane + i]); });
}

}  // namespace

Handler wmma_handler(const Instruction& in) {
  switch (in.op) {
    case Op::WmmaLoad:
      return load;
    case Op::WmmaStore:
      return store;
    case Op::WmmaMma:
      return is_int8(in.type) ? mma_int8 : mma_float;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
