// Random networks in int8 and bfloat16 through every kind of kernels that this processor can run: the same
// bits from all of one element and multiple of quads, which decides what weights there are.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/direct/network.h"

namespace {

using namespace parnet::cpu::direct;

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

uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 16;
}

Owned random_layer(std::mt19937& random, Kind kind, int in_channels, int out_channels, int stride, bool last,
                   const Kernels& k) {
  const bool bytes = k.element == Element::kByte;
  const auto byte = [&] { return static_cast<int8_t>(static_cast<int>(random() % 255) - 127); };
  const auto narrow = [&] { return bfloat16((static_cast<int>(random() % 255) - 127) / 1000.f); };
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
      const int first = g * half * bytes_of(k.element) / 4 * 4;
      const int64_t quads = div_up(half * bytes_of(k.element) + 3, 4);
      l.segments[g][j] = {first, static_cast<int32_t>(div_up(quads, k.quad_multiple) * k.quad_multiple)};
    }
  }
  for (int j = 0; j < l.inputs; j++) l.panel_bytes += int64_t{9} * l.segments[0][j].quads * 4 * kPanel;
  const int64_t lanes = int64_t{l.panels} * kPanel;
  if (bytes) {
    l.weight = o.array<int8_t>(l.panels * l.panel_bytes, byte);
    l.start = o.array<int32_t>(lanes, [&] { return static_cast<int32_t>(random() % 1000); });
    l.gate_weight = o.array<int8_t>(lanes * l.gate_channels, byte);
  } else {
    l.weight = reinterpret_cast<const int8_t*>(o.array<uint16_t>(l.panels * l.panel_bytes / 2, narrow));
    l.start = o.array<float>(lanes, small);
    l.gate_weight = o.array<uint16_t>(lanes * l.gate_channels, narrow);
  }
  for (const float** f : {&l.multiplier, &l.bias, &l.skip_scale, &l.skip_shift, &l.out_scale, &l.out_shift,
                          &l.gate_multiplier, &l.gate_bias}) {
    *f = o.array<float>(lanes, small);
  }
  l.in_scale = bytes ? .02f : 1.f, l.in_zero = l.out_zero = bytes ? 7 : 0, l.last = last;
  return o;
}

void on_threads(int threads, Network::Body body, void* context) {
  std::vector<std::thread> all;
  for (int i = 0; i < threads; i++) all.emplace_back(body, context);
  for (std::thread& t : all) t.join();
}

}  // namespace

// False if kernels of one kind give other bytes than those before.
bool run_direct(int seeds) {
  for (int seed = 0; seed < seeds; seed++) {
    std::map<std::pair<Element, int>, std::vector<float>> expected;
    for (int64_t index = 0; index < count(); index++) {
      if (!supported(index)) continue;
      const Kernels& k = kernels(index);
      // Each product of the emulated ones is a library call.
      if (seed >= 2 && std::strcmp(k.name, "bf16_tiles") == 0) continue;
      std::mt19937 random(seed);
      const int c = 2 * (1 + random() % 40), wide = 2 * (1 + random() % 40), height = 1 + random() % 20,
                width = 1 + random() % 40, images = 1 + random() % 2;
      std::vector<Owned> owned;
      owned.push_back(random_layer(random, Kind::kSkip, c, c, 1, false, k));
      owned.push_back(random_layer(random, Kind::kPlain, c, wide, 2, false, k));
      owned.push_back(random_layer(random, Kind::kPlain, c, wide, 2, false, k));
      owned.push_back(random_layer(random, Kind::kFusion, wide, c, 1, false, k));
      owned.push_back(random_layer(random, Kind::kPlain, c, wide, 2, true, k));
      const std::vector<Step> steps = {{owned[0].layer, 0, -1, 1},
                                       {owned[1].layer, 1, -1, 2},
                                       {owned[2].layer, 0, -1, 3},
                                       {owned[3].layer, 2, 3, 4},
                                       {owned[4].layer, 4, -1, 5}};
      const Network network(steps, {images, c, height, width}, 2, k);
      std::vector<float> x(int64_t{images} * c * height * width);
      for (float& v : x) v = static_cast<float>(random() % 500) / 100.f;
      std::vector<uint16_t> narrow;
      for (const float v : x) narrow.push_back(bfloat16(v));
      const auto shape = network.result_shape();
      std::vector<float> y(shape[0] * shape[1] * shape[2] * shape[3]);
      const int64_t bytes = network.workspace_bytes();
      auto* workspace = static_cast<char*>(std::aligned_alloc(64, div_up(bytes, 64) * 64));
      std::memset(workspace, 0xa5, bytes);
      const void* entered = k.element == Element::kByte ? static_cast<const void*>(x.data()) : narrow.data();
      network.run(entered, y.data(), workspace, on_threads);
      std::free(workspace);
      std::vector<float>& before = expected[{k.element, k.quad_multiple}];
      if (before.empty()) before = y;
      if (std::memcmp(before.data(), y.data(), y.size() * sizeof(float)) != 0) {
        std::printf("kernels %s: other values than kernels before (seed %d)\n", k.name, seed);
        return false;
      }
    }
  }
  return true;
}
