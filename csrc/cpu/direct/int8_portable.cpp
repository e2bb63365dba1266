// Products in plain C++: what tests compare the others with, and what runs where nothing better is.
#include <stdint.h>
#include <string.h>
#define PARNET_DOT_LANES 16
#define PARNET_DOT_ROWS 2

namespace {
struct Sum {
  int32_t lane[PARNET_DOT_LANES];
};
struct Weights {
  int8_t byte[4 * PARNET_DOT_LANES];
};
inline Sum load_sum(const int32_t* from) {
  Sum s;
  memcpy(&s, from, sizeof(s));
  return s;
}
inline void store_sum(int32_t* to, Sum s) { memcpy(to, &s, sizeof(s)); }
inline Weights load_weights(const int8_t* from) {
  Weights w;
  memcpy(&w, from, sizeof(w));
  return w;
}
inline void dot(Sum& sum, int32_t bytes, const Weights& w) {
  uint8_t x[4];
  memcpy(x, &bytes, 4);
  for (int i = 0; i < PARNET_DOT_LANES; i++) {
    for (int j = 0; j < 4; j++) sum.lane[i] += x[j] * w.byte[4 * i + j];
  }
}
}  // namespace

#include "epilogue.h"

namespace parnet::cpu::direct {
extern const Kernels kernels_portable;
constinit const Kernels kernels_portable = table_of("portable", 1);
}  // namespace parnet::cpu::direct
