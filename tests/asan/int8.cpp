// Random int8 networks through every kind of int8 kernels that this processor can run: the same bytes from
// all.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/int8/network.h"

namespace {

using namespace parnet::cpu::int8;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A layer and what its pointers point to, each block of exactly its size.
struct Owned {
  Layer layer{};
  std::vector<std::unique_ptr<void, decltype(&std::free)>> blocks;

  template <class T, class Make>
  const T* array(int64_t count, Make make) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, count * sizeof(T)) != 0) std::abort();
    blocks.emplace_back(block, &std::free);
    T* values = static_cast<T*>(block);
    for (int64_t i = 0; i < count; i++) values[i] = make();
    return values;
  }
};

Owned random_layer(std::mt19937& random, Kind kind, int in_channels, int out_channels, int stride, bool last,
                   int quad_multiple) {
  const auto byte = [&] { return static_cast<int8_t>(static_cast<int>(random() % 255) - 127); };
  const auto small = [&] { return static_cast<float>(random() % 1000) / 100000.f; };
  Owned o;
  Layer& l = o.layer;
  l.kind = kind, l.activation = random() % 2 ? Activation::kSiLU : Activation::kReLU, l.stride = stride;
  l.groups = l.inputs = kind == Kind::kFusion ? 2 : 1;
  l.in_channels = l.gate_channels = in_channels, l.out_channels = out_channels;
  l.panels = l.groups * div_up(out_channels / l.groups, kPanel);
  const int half =
      kind == Kind::kFusion ? in_channels / 2 : in_channels;  // even channels: groups read halves
  for (int g = 0; g < l.groups; g++) {
    for (int j = 0; j < l.inputs; j++) {
      const int first = g * half / 4 * 4;
      l.segments[g][j] = {first,
                          static_cast<int32_t>(div_up(div_up(half + 3, 4), quad_multiple) * quad_multiple)};
    }
  }
  for (int j = 0; j < l.inputs; j++) l.panel_bytes += int64_t{9} * l.segments[0][j].quads * 4 * kPanel;
  const int64_t lanes = int64_t{l.panels} * kPanel;
  l.weight = o.array<int8_t>(l.panels * l.panel_bytes, byte);
  l.start = o.array<int32_t>(lanes, [&] { return static_cast<int32_t>(random() % 1000); });
  for (const float** f : {&l.multiplier, &l.bias, &l.skip_scale, &l.skip_shift, &l.out_scale, &l.out_shift,
                          &l.gate_multiplier, &l.gate_bias}) {
    *f = o.array<float>(lanes, small);
  }
  l.gate_weight = o.array<int8_t>(lanes * l.gate_channels, byte);
  l.in_scale = .02f, l.in_zero = 7, l.out_zero = 7, l.last = last;
  return o;
}

void on_threads(int threads, Network::Body body, void* context) {
  std::vector<std::thread> all;
  for (int i = 0; i < threads; i++) all.emplace_back(body, context);
  for (std::thread& t : all) t.join();
}

}  // namespace

// False if kernels of one kind give other bytes than those before.
bool run_int8(int seeds) {
  for (int seed = 0; seed < seeds; seed++) {
    std::vector<float> expected[2];  // for each multiple of quads: it decides which weights are random
    for (int64_t index = 0; index < count(); index++) {
      if (!supported(index)) continue;
      const Kernels& k = kernels(index);
      std::mt19937 random(seed);
      const int c = 2 * (1 + random() % 40), wide = 2 * (1 + random() % 40), height = 1 + random() % 20,
                width = 1 + random() % 40, images = 1 + random() % 2;
      std::vector<Owned> owned;
      owned.push_back(random_layer(random, Kind::kSkip, c, c, 1, false, k.quad_multiple));
      owned.push_back(random_layer(random, Kind::kPlain, c, wide, 2, false, k.quad_multiple));
      owned.push_back(random_layer(random, Kind::kPlain, c, wide, 2, false, k.quad_multiple));
      owned.push_back(random_layer(random, Kind::kFusion, wide, c, 1, false, k.quad_multiple));
      owned.push_back(random_layer(random, Kind::kPlain, c, wide, 2, true, k.quad_multiple));
      const std::vector<Step> steps = {{owned[0].layer, 0, -1, 1},
                                       {owned[1].layer, 1, -1, 2},
                                       {owned[2].layer, 0, -1, 3},
                                       {owned[3].layer, 2, 3, 4},
                                       {owned[4].layer, 4, -1, 5}};
      const Network network(steps, {images, c, height, width}, 2, k);
      std::vector<float> x(int64_t{images} * c * height * width);
      for (float& v : x) v = static_cast<float>(random() % 500) / 100.f;
      const auto shape = network.result_shape();
      std::vector<float> y(shape[0] * shape[1] * shape[2] * shape[3]);
      const int64_t bytes = network.workspace_bytes();
      auto* workspace = static_cast<char*>(std::aligned_alloc(64, div_up(bytes, 64) * 64));
      std::memset(workspace, 0xa5, bytes);
      network.run(x.data(), y.data(), workspace, on_threads);
      std::free(workspace);
      std::vector<float>& before = expected[k.quad_multiple > 1];
      if (before.empty()) before = y;
      if (std::memcmp(before.data(), y.data(), y.size() * sizeof(float)) != 0) {
        std::printf("int8 kernels %s: other values than kernels before (seed %d)\n", k.name, seed);
        return false;
      }
    }
  }
  return true;
}
