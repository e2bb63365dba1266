// The contract between the schedule of networks that run in int8 or bfloat16 and their kernels, compiled once
// per instruction set: plain data only. They convolve directly: products are what these processors have.
//
// An activation in int8 is a map of bytes q; the value that one stands for is scale * (q - zero). Products of
// bytes and 8-bit weights are added in 32-bit integers, so they are the same on every instruction set; what
// follows them is float, without contraction, so it is the same as well. In bfloat16 scales are 1, zeros 0,
// and sums float.
#pragma once
#include <stdint.h>

namespace parnet::cpu::direct {

constexpr int kPanel = 32;    // output channels that one call multiplies
constexpr int kMaxRows = 14;  // pixels that one call multiplies, side by side in a row of the map
constexpr int64_t kMaxPixels = int64_t{1} << 23;  // of a map: sums of its bytes stay within 32 bits
// Bytes behind a pixel that are multiplied with zeros: they must be finite behind a map's last one, too.
constexpr int64_t kReadBeyond = 64;

enum class Kind : int32_t { kSkip, kPlain, kFusion };
enum class Activation : int32_t { kSiLU, kReLU };
enum class Element : int32_t { kByte, kBfloat16 };
constexpr int bytes_of(Element e) { return e == Element::kByte ? 1 : 2; }

// Values [image][row][pixel][channel], steps in bytes, with one row and column of padding on each side.
// `base` is pixel (0, 0).
struct Map {
  uint8_t* base;
  int64_t image, row, pixel;
};

// The channels of one input that a group multiplies: `quads` times 4 bytes from byte `first` of a pixel.
struct Segment {
  int32_t first, quads;
};

// One layer. Vectors of floats are [panel][kPanel]; panels of two groups alternate: panel 2*i + g is the i-th
// of group g. Their values are explained where Python makes them (parnet_kernels/cpu/direct.py).
struct Layer {
  Kind kind;
  Activation activation;
  int32_t stride, groups, inputs, in_channels, out_channels, panels;
  Segment segments[2][2];  // [group][input]
  int64_t panel_bytes;     // of weights
  const int8_t* weight;    // [panel][input][tap][quad][kPanel][4]
  const void* start;       // [panel][kPanel], what the sums of products start from: int32_t or float
  const float *multiplier, *bias, *skip_scale, *skip_shift, *out_scale, *out_shift;
  const void* gate_weight;  // [panel][channel of the group][kPanel], int8_t or bfloat16
  const float *gate_multiplier, *gate_bias;
  int32_t gate_channels;  // of a group
  float in_scale;
  int32_t in_zero, out_zero;
  bool last;  // its output is a map of floats
};

// What `gate` makes for one image and layer: y = phi(multiplier*products + skip*q + offset).
struct Gates {
  float *multiplier, *skip, *offset;  // [panel][kPanel]
};

struct ConvArgs {
  const Layer* layer;
  Map in[2];
  Map out;
  float* out_floats;  // of the last layer: pixel (0, 0) of [row][pixel][channel]
  Gates gates;
  int32_t out_rows, out_cols;
  void* sums;  // int32_t or float [channel]: of the item's rows or, with a step, of its first row; null for
               // the last layer
  int64_t sum_step;  // in channels, from a row's sums to those of the next; 0: the rows' sums are one
};

struct GateArgs {
  const Layer* layer;
  const void* sums[2];  // of each input: [sum row][channel]
  int32_t sum_rows[2], channels[2];
  int32_t pixels;  // of the input's map
  Gates gates;
  float* means;  // scratch
};

// A map [row][pixel][channel] of floats to bytes, or of bfloat16 to the same, a row; false if a float is not
// finite.
struct EnterArgs {
  const void* from;
  uint8_t* to;
  int64_t pixel;
  int32_t pixels, channels;
  float inverse_scale, zero;
  void* sums;
};

struct Kernels {
  const char* name;
  Element element;
  int32_t quad_multiple;  // of the quads of a segment, in packed weights
  int32_t map_rows;       // rows of the map that are multiplied at a time
  // Output rows [first_row, last_row) and panels [first, last) of one image.
  void (*convolve)(const ConvArgs&, int first_row, int last_row, int first, int last);
  // False if a mean is not finite.
  bool (*gate)(const GateArgs&, int first, int last);
  bool (*enter)(const EnterArgs&);
};

// Kernels by number; throws std::runtime_error for those that this processor cannot run.
const Kernels& kernels(int64_t index);
int64_t count();
bool supported(int64_t index);
// The number of the fastest for this processor, or -1 if it has no instructions for such products.
int64_t best(Element);

}  // namespace parnet::cpu::direct
