// mma.sync. aux: k; imm: type of C and D; imm2: m. Sources: registers of A, B, C, by the layouts of the PTX
// ISA.
#include "families.hpp"
#include "matrix_math.hpp"

namespace ptxsim {

namespace {

// C[16][8] += A[16][k] * B[k][8]
inline void multiply_tile(const float* A, const float* B, float* C, int k_size) {
  for (int top = 0; top < 16; top += 8) {
    __m256 sum[8];
    for (int i = 0; i < 8; i++) sum[i] = _mm256_loadu_ps(C + 8 * (top + i));
    for (int k = 0; k < k_size; k++) {
      __m256 b = _mm256_loadu_ps(B + 8 * k);
      for (int i = 0; i < 8; i++)
        sum[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(A + k_size * (top + i) + k), b, sum[i]);
    }
    for (int i = 0; i < 8; i++) _mm256_storeu_ps(C + 8 * (top + i), sum[i]);
  }
}

// 64 16-bit values, in the order of the lanes, to floats
inline void widen64(const u32* from, float* to, bool bfloat) {
  for (int i = 0; i < 8; i++) {
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
    __m256 f =
        bfloat ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)) : _mm256_cvtph_ps(x);
    _mm256_storeu_ps(to + 8 * i, f);
  }
}

struct Registers {
  const u32 *a[8], *b[8], *c[8];
  int n_a, n_b, n_c;

  Registers(Context& ctx, const Instruction& in, int m, int k, int per_register) {
    n_a = m * k / 32 / per_register;
    n_b = 8 * k / 32 / per_register;
    n_c = in.n_src - n_a - n_b;
    for (int i = 0; i < n_a; i++) a[i] = slots<u32>(ctx, source_code(ctx, in, i));
    for (int i = 0; i < n_b; i++) b[i] = slots<u32>(ctx, source_code(ctx, in, n_a + i));
    for (int i = 0; i < n_c; i++) c[i] = slots<u32>(ctx, source_code(ctx, in, n_a + n_b + i));
  }
};

void load_operands(const Instruction& in, const Registers& r, float* A, float* B, int K) {
  if (elements_per_register(in.type) == 2) {
    float part[64];
    bool bfloat = in.type == Type::BF16;
    for (int i = 0; i < r.n_a; i++) {
      widen64(r.a[i], part, bfloat);
      for (int row = 0; row < 8; row++)
        std::memcpy(A + (8 * (i & 1) + row) * K + 8 * (i >> 1), part + 8 * row, 32);
    }
    for (int i = 0; i < r.n_b; i++) {
      widen64(r.b[i], part, bfloat);
      for (int k = 0; k < 8; k++)
        for (int n = 0; n < 8; n++) B[(8 * i + k) * 8 + n] = part[8 * n + k];
    }
    return;
  }
  int per = elements_per_register(in.type);
  for (int l = 0; l < 32; l++) {
    int group = l >> 2, within = l & 3;
    for (int e = 0; e < per; e++) {
      for (int i = 0; i < r.n_a; i++)
        A[(group + 8 * (i & 1)) * K + 4 * per * (i >> 1) + per * within + e] =
            fragment_float(in.type, r.a[i][l], e);
      for (int i = 0; i < r.n_b; i++)
        B[(4 * per * i + per * within + e) * 8 + group] = fragment_float(in.type2, r.b[i][l], e);
    }
  }
}

void mma_float(Context& c, const Instruction& in) {
  const int K = in.aux;
  Registers r(c, in, 16, K, elements_per_register(in.type));
  alignas(32) float A[16 * 32], B[32 * 8], C[16 * 8];
  load_operands(in, r, A, B, K);
  u32 out[32];
  if (static_cast<Type>(in.imm) == Type::F32) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) C[tile_row(l, i) * 8 + tile_column(l, i)] = bits_float(r.c[i][l]);
    multiply_tile(A, B, C, K);
    for (int i = 0; i < 4; i++) {
      for (int l = 0; l < 32; l++) out[l] = float_bits(C[tile_row(l, i) * 8 + tile_column(l, i)]);
      store_slots<u32>(c, operand(c, in, i), out);
    }
  } else {  // f16 accumulators: two in a register
    for (int i = 0; i < 2; i++) widen64(r.c[i], C + 64 * i, false);
    multiply_tile(A, B, C, K);
    for (int i = 0; i < 2; i++) {
      const float* half = C + 64 * i;
      for (int l = 0; l < 32; l++)
        out[l] = float_to_half(half[2 * l]) | u32(float_to_half(half[2 * l + 1])) << 16;
      store_slots<u32>(c, operand(c, in, i), out);
    }
  }
}

void mma_int8(Context& c, const Instruction& in) {
  const int M = int(in.imm2), K = in.aux;
  Registers r(c, in, M, K, 4);
  s32 A[16][32], B[32][8];
  int halves = M / 8;  // of A: registers alternate between its upper and lower rows
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < 4; e++) {
      int group = l >> 2, column = 4 * (l & 3) + e;
      for (int i = 0; i < r.n_a; i++)
        A[group + 8 * (i % halves)][16 * (i / halves) + column] = fragment_int(in.type, r.a[i][l], e);
      for (int i = 0; i < r.n_b; i++) B[16 * i + column][group] = fragment_int(in.type2, r.b[i][l], e);
    }
  u32 out[4][32];
  for (int i = 0; i < r.n_c; i++)
    for (int l = 0; l < 32; l++) {
      s64 sum = 0;
      for (int k = 0; k < K; k++) sum += s64(A[tile_row(l, i)][k]) * B[k][tile_column(l, i)];
      out[i][l] = u32(add_products(s32(r.c[i][l]), sum, in.has(mod::SatFinite)));
    }
  for (int i = 0; i < r.n_c; i++) store_slots<u32>(c, operand(c, in, i), out[i]);
}

void mma_f64(Context& c, const Instruction& in) {
  const int M = int(in.imm2), K = in.aux, n_a = M * K / 32, n_b = 8 * K / 32, halves = M / 8;
  double A[16 * 16], B[16 * 8], C[16 * 8];
  auto value = [&](int k, int l) { return bits_double(lane_source(c, in, k, l)); };
  for (int l = 0; l < 32; l++) {
    int group = l >> 2, within = l & 3;
    for (int i = 0; i < n_a; i++) A[(group + 8 * (i % halves)) * K + within + 4 * (i / halves)] = value(i, l);
    for (int i = 0; i < n_b; i++) B[(within + 4 * i) * 8 + group] = value(n_a + i, l);
    for (int i = 0; i < in.n_dst; i++) C[tile_row(l, i) * 8 + tile_column(l, i)] = value(n_a + n_b + i, l);
  }
  for (int row = 0; row < M; row++)
    for (int n = 0; n < 8; n++)
      for (int k = 0; k < K; k++) C[row * 8 + n] = std::fma(A[row * K + k], B[k * 8 + n], C[row * 8 + n]);
  for (int i = 0; i < in.n_dst; i++)
    for (int l = 0; l < 32; l++)
      set_lane(c, operand(c, in, i), l, double_bits(C[tile_row(l, i) * 8 + tile_column(l, i)]));
}

}  // namespace

Handler mma_handler(const Instruction& in) {
  if (in.op != Op::Mma) return nullptr;
  return in.type == Type::F64 ? mma_f64 : is_int8(in.type) ? mma_int8 : mma_float;
}

}  // namespace ptxsim
