// ldmatrix, stmatrix, movmatrix: 8x8 matrices of 16-bit elements, a row of 16 bytes at each given address.
#include "families.hpp"
#include "memory.hpp"

namespace ptxsim {

namespace {

u32 lanes_with_addresses(int matrices) { return matrices == 4 ? ~0u : (1u << 8 * matrices) - 1; }

u16 element(const u8* row, int column) {
  u16 value;
  std::memcpy(&value, row + 2 * column, 2);
  return value;
}

// aux: the number of matrices. Lane l gets elements (l/4, 2(l%4)) and the next; Transposed: of the transposed
// matrix.
void ldmatrix(Context& c, const Instruction& in) {
  u64 address[32];
  u32 row_address[32];
  u8* row[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  for (int l = 0; l < 32; l++) row_address[l] = u32(address[l]);
  shared_access(c, row_address, lanes_with_addresses(in.aux), 16, kRead, row);
  for (int i = 0; i < in.aux; i++) {
    u32 out[32];
    u8** matrix = row + 8 * i;
    if (in.has(mod::Transposed))
      for (int l = 0; l < 32; l++)
        out[l] = element(matrix[2 * (l & 3)], l >> 2) | u32(element(matrix[2 * (l & 3) + 1], l >> 2)) << 16;
    else
      for (int r = 0; r < 8; r++) std::memcpy(out + 4 * r, matrix[r], 16);
    store_slots<u32>(c, operand(c, in, i), out);
  }
}

void stmatrix(Context& c, const Instruction& in) {
  u64 address[32];
  u32 row_address[32];
  u8* row[32];
  addresses(c, source_code(c, in, 0), in.imm, address);
  for (int l = 0; l < 32; l++) row_address[l] = u32(address[l]);
  shared_access(c, row_address, lanes_with_addresses(in.aux), 16, kWrite, row);
  for (int i = 0; i < in.aux; i++) {
    const u32* values = slots<u32>(c, source_code(c, in, 1 + i));
    u8** matrix = row + 8 * i;
    if (in.has(mod::Transposed)) {
      for (int l = 0; l < 32; l++)
        for (int h = 0; h < 2; h++) {
          u16 value = u16(values[l] >> 16 * h);
          std::memcpy(matrix[2 * (l & 3) + h] + 2 * (l >> 2), &value, 2);
        }
    } else {
      for (int r = 0; r < 8; r++) std::memcpy(matrix[r], values + 4 * r, 16);
    }
  }
}

void movmatrix(Context& c, const Instruction& in) {
  const u32* values = slots<u32>(c, source_code(c, in, 0));
  u16 matrix[8][8];
  u32 out[32];
  for (int l = 0; l < 32; l++)
    for (int h = 0; h < 2; h++) matrix[l >> 2][2 * (l & 3) + h] = u16(values[l] >> 16 * h);
  for (int l = 0; l < 32; l++)
    out[l] = matrix[2 * (l & 3)][l >> 2] | u32(matrix[2 * (l & 3) + 1][l >> 2]) << 16;
  store_slots<u32>(c, operand(c, in, 0), out);
}

}  // namespace

u8 stmatrix_byte(const Context& c, const Instruction& in, int lane, int offset) {
  const u32* values = slots<u32>(c, source_code(c, in, 1 + lane / 8));
  const int row = lane % 8, column = offset / 2, byte = offset % 2;
  return in.has(mod::Transposed) ? u8(values[4 * column + row / 2] >> (16 * (row % 2) + 8 * byte))
                                 : u8(values[4 * row + column / 2] >> (16 * (column % 2) + 8 * byte));
}

Handler matrix_load_handler(const Instruction& in) {
  switch (in.op) {
    case Op::Ldmatrix:
      return ldmatrix;
    case Op::Stmatrix:
      return stmatrix;
    case Op::Movmatrix:
      return movmatrix;
    default:
      return nullptr;
  }
}

}  // namespace ptxsim
