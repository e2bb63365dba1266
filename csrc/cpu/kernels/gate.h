// Products of a matrix and a vector of channel means: the gate of a layer, and the classifier.
#pragma once
#include "convert.h"
#include "epilogue.h"

namespace parnet::cpu {
namespace {

// One panel of outputs, sum[half] = w * mean; w: [channel][kPanel], `channels` is a multiple of 4.
PARNET_INLINE void multiply_means(const float* mean, const float* w, int channels, Vec* sum) {
  Vec part[4][2];
  for (int i = 0; i < 4; i++) part[i][0] = part[i][1] = zero();
  for (int c = 0; c < channels; c += 4, w += 4 * kPanel) {
    PARNET_UNROLL for (int i = 0; i < 4; i++) {
      prefetch(w + 1024 + i * kPanel);
      const Vec x = splat(mean[c + i]);
      part[i][0] = fma(x, load(w + i * kPanel), part[i][0]);
      part[i][1] = fma(x, load(w + i * kPanel + kLanes), part[i][1]);
    }
  }
  for (int half = 0; half < 2; half++) {
    sum[half] = (part[0][half] + part[1][half]) + (part[2][half] + part[3][half]);
  }
}

// Scale and offset of the epilogue, for one image and the panels [first, last), from the channel sums of the
// inputs.
void gate(const GateArgs& a, int image, int first, int last) {
  const PackedHeader& h = *a.packed;
  const int channels = h.group_blocks * kLanes;
  const BlockRef* refs = section<BlockRef>(h, h.block_list);
  for (int b = 0; b < h.groups * h.group_blocks; b++) {
    const int input = refs[b].input, rows = a.sum_rows[input], pitch = h.in_blocks * kLanes;
    const float* from = a.sums[input] + int64_t{image} * rows * pitch + refs[b].block * kLanes;
    Vec sum = zero();
    for (int r = 0; r < rows; r++) sum = sum + load(from + int64_t{r} * pitch);
    store(a.means + b * kLanes, a.inverse_area * sum);
  }
  for (int k = first; k < last; k++) {
    Vec total[2];
    multiply_means(a.means + (k % h.groups) * channels,
                   section<float>(h, h.gate_weight) + int64_t{k} * channels * kPanel, channels, total);
    for (int half = 0; half < 2; half++) {
      const int at = k * kPanel + half * kLanes;
      const int64_t to = int64_t{image} * h.panels * kPanel + at;
      const Vec bias = load(section<float>(h, h.bias) + at);
      const Vec g = sigmoid(total[half] + load(section<float>(h, h.gate_bias) + at));
      if (h.kind == Kind::kRepVGG) {
        store(a.scale + to, g * load(section<float>(h, h.skip_scale) + at));
        store(a.offset + to, fma(g, load(section<float>(h, h.skip_shift) + at), bias));
      } else {
        store(a.scale + to, 2.f * g);
        store(a.offset + to, 2.f * g * bias);
      }
    }
  }
}

// One panel of logits of all images.
template <class T>
void classify_panel(const PackedHeader& h, const float* means, int panel, const Strided& y) {
  const int pitch = h.in_blocks * kLanes, count = least(kPanel, h.out_channels - panel * kPanel);
  for (int image = 0; image < y.size[0]; image++) {
    Vec total[2];
    multiply_means(means + int64_t{image} * pitch,
                   section<float>(h, h.weight) + int64_t{panel} * pitch * kPanel, pitch, total);
    alignas(64) float logits[kPanel];
    for (int half = 0; half < 2; half++) {
      const int at = half * kLanes;
      store(logits + at, total[half] + load(section<float>(h, h.bias) + panel * kPanel + at));
    }
    T* to = const_cast<T*>(at<T>(y, image, panel * kPanel, 0));
    for (int i = 0; i < count; i++) narrow(logits[i], to + i);
  }
}
void classify(const PackedHeader& h, const float* means, int panel, const Strided& y) {
  PARNET_BY_DTYPE(y.dtype, classify_panel, h, means, panel, y)
}

}  // namespace
}  // namespace parnet::cpu
