// The schemes of fast convolution along one axis, and the weights they multiply, as plain data; their
// arithmetic is in kernels/winograd.h. In two dimensions one scheme applies along rows, another along
// columns.
//
// A scheme turns `outputs` + 2 neighbouring inputs (stride 1; more at stride 2) into `values` transformed
// inputs v, multiplies each by one transformed weight u, and turns the products m = v * u into outputs.
// All schemes of a stride use weights out of one list, so that tiles of different sizes share them.
#pragma once
#include <stdint.h>

namespace parnet::cpu {

// How a transformed weight is made of the three taps t0, t1, t2: a tap, or a sum of taps times powers of two.
enum class Form {
  kTap,         // one tap
  kPlus,        // t0 + t1 + t2
  kMinus,       // t0 - t1 + t2
  kPlusTwice,   // t0 + 2 t1 + 4 t2
  kMinusTwice,  // t0 - 2 t1 + 4 t2
  kPlusHalf,    // 4 t0 + 2 t1 + t2
  kMinusHalf,   // 4 t0 - 2 t1 + t2
  kSum,         // t0 + t2
  kDifference,  // t0 - t2
  kSumTwice     // t0 + 2 t2
};

// One transformed weight along one axis. `tap`: the one that kTap copies.
struct Slot {
  Form form;
  int tap;
};

// Weights along one axis: F(6, 3) needs all 8, the other schemes some of the first 6.
constexpr int kMaxSlots = 8, kFewSlots = 6;
// [stride - 1][slot]
constexpr Slot kSlots[2][kMaxSlots] = {
    // Stride 1: the taps as a polynomial, evaluated at 0, infinity, 1, -1, 2, -2, 1/2, -1/2; the values at
    // +-1/2 times 4. Errors at 128 channels: F(6, 3) 2.4e-6, F(4, 3) 1.6e-6. Rejected: 0, infinity,
    // +-1/sqrt(2), +-sqrt(2) for F(4, 3): 0.7e-6, but F(6, 3) with these points has 7e-6, and tiles of both
    // sizes must share their weights.
    {{Form::kTap, 0},
     {Form::kTap, 2},
     {Form::kPlus, 0},
     {Form::kMinus, 0},
     {Form::kPlusTwice, 0},
     {Form::kMinusTwice, 0},
     {Form::kPlusHalf, 0},
     {Form::kMinusHalf, 0}},
    // Stride 2 splits the filter: y[i] = (t0 x[2i-1] + t2 x[2i+1]) + t1 x[2i]. Of the 2-tap filter t0, t2 the
    // values at 0, 1, -1, 2, infinity, then t1, which multiplies each even input as it is.
    {{Form::kTap, 0},
     {Form::kSum, 0},
     {Form::kDifference, 0},
     {Form::kSumTwice, 0},
     {Form::kTap, 2},
     {Form::kTap, 1}}};

constexpr int kMaxValues = 9;
struct Scheme {
  int outputs, values;
  int slot[kMaxValues];  // of the weight that each transformed input is multiplied by
};
// A kind is an index of kSchemes. Stride 1: F(2, 3), F(4, 3), F(6, 3); stride 2: F(n, 2) and the odd tap.
constexpr int kKinds[2] = {3, 4};
// [stride - 1][kind]
constexpr Scheme kSchemes[2][4] = {{{2, 4, {0, 1, 2, 3}},  //
                                    {4, 6, {0, 1, 2, 3, 4, 5}},
                                    {6, 8, {0, 1, 2, 3, 4, 5, 6, 7}}},
                                   {{1, 3, {0, 4, 5}},
                                    {2, 5, {0, 1, 4, 5, 5}},
                                    {3, 7, {0, 1, 2, 4, 5, 5, 5}},
                                    {4, 9, {0, 1, 2, 3, 4, 5, 5, 5, 5}}}};
constexpr int kMaxTile = 6;                              // outputs along one side of the largest tile
constexpr int kMaxTransforms = kMaxValues * kMaxValues;  // transformed inputs of the largest tile

// Limits of F(6, 3). With more input channels its error exceeds 3e-6 (of the bare convolution, norm-wise).
constexpr int kMaxChannels6 = 512;
// With fewer output channels single ones of them can have errors above 3e-6, and there is little to gain.
constexpr int kMinOutputs6 = 12;

// Weights along one axis that a layer stores or can make. The square of it is its number of matrices.
constexpr int slots_of(int stride, int in_channels) {
  return stride == 1 && in_channels <= kMaxChannels6 ? kMaxSlots : kFewSlots;
}

}  // namespace parnet::cpu
