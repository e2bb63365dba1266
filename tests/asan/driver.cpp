// Runs the CPU kernels under a sanitizer, without Python: random layers and a small network on exactly sized
// heap blocks, checked against a direct convolution in double. Usage: driver SECONDS
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/schedule/network.h"
#include "../../csrc/cpu/schedule/pack.h"

using namespace parnet::cpu;

bool run_direct(int seeds);  // direct.cpp

namespace {

std::mt19937 random_engine(0);

int pick(std::initializer_list<int> values) { return values.begin()[random_engine() % values.size()]; }

std::vector<float> normal(size_t count, float scale) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> values(count);
  for (float& v : values) v = distribution(random_engine);
  return values;
}

struct Map {
  int64_t n, c, h, w;
  std::vector<double> values;
  double at(int64_t i, int64_t k, int64_t y, int64_t x) const {
    return y < 0 || x < 0 || y >= h || x >= w ? 0. : values[((i * c + k) * h + y) * w + x];
  }
};

typedef std::unique_ptr<char, void (*)(void*)> Bytes;

Bytes zeroed(int64_t bytes) {
  Bytes result(static_cast<char*>(std::aligned_alloc(64, bytes)), std::free);
  std::memset(result.get(), 0, bytes);
  return result;
}

void parallel(int64_t count, const std::function<void(int64_t)>& body) {
  std::thread second([&] {
    for (int64_t i = 1; i < count; i += 2) body(i);
  });
  for (int64_t i = 0; i < count; i += 2) body(i);
  second.join();
}

struct Layer {
  LayerParameters p{};
  std::vector<float> weight, bias, gate_weight, gate_bias, skip_scale, skip_shift, out_scale, out_shift;
  Bytes packed{nullptr, std::free};
  const PackedHeader* header = nullptr;

  Layer(Kind kind, int channels, int outputs, int stride) {
    p.kind = kind;
    p.stride = stride;
    p.activation = pick({0, 1}) ? Activation::kSiLU : Activation::kReLU;
    p.storage = static_cast<Storage>(pick({0, 1, 2}));
    p.out_channels = outputs;
    p.weight_channels = channels;
    p.weight = (weight = normal(outputs * channels * 9, .3f / std::sqrt(channels))).data();
    p.bias = (bias = normal(outputs, .3f)).data();
    p.gate_weight = (gate_weight = normal(outputs * channels, 1 / std::sqrt(channels))).data();
    if (pick({0, 1})) p.gate_bias = (gate_bias = normal(outputs, .3f)).data();
    if (kind == Kind::kRepVGG) {
      p.skip_scale = (skip_scale = normal(outputs, 1)).data();
      p.skip_shift = (skip_shift = normal(outputs, .3f)).data();
    }
    if (pick({0, 1})) {
      p.out_scale = (out_scale = normal(outputs, 1)).data();
      p.out_shift = (out_shift = normal(outputs, .3f)).data();
    }
    const PackedHeader h = plan_pack(p, kernels());
    packed = zeroed(h.total_bytes);
    pack(p, kernels(), h, packed.get(), parallel);
    header = &check_packed(packed.get(), h.total_bytes, kernels());
  }

  Map expected(const Map& x, const Map* y) const {
    const int groups = y ? 2 : 1;
    const int64_t c = p.weight_channels, k = p.out_channels;
    Map out{x.n, k, (x.h - 1) / p.stride + 1, (x.w - 1) / p.stride + 1, {}};
    out.values.resize(out.n * k * out.h * out.w);
    for (int64_t i = 0; i < x.n; i++) {
      for (int64_t row = 0; row < k; row++) {  // of the weight
        const int64_t group = row / (k / groups), result = y ? row % (k / 2) * 2 + group : row;
        // Channel of the weight -> map and channel.
        const auto input = [&](int64_t t) -> std::pair<const Map*, int64_t> {
          return y ? std::pair{(group * c + t) % 2 ? y : &x, (group * c + t) / 2} : std::pair{&x, t};
        };
        double gate = p.gate_bias ? p.gate_bias[row] : 0.;
        for (int64_t t = 0; t < c; t++) {
          const auto [map, channel] = input(t);
          double mean = 0;
          for (int64_t at = 0; at < x.h * x.w; at++) mean += map->values[(i * c + channel) * x.h * x.w + at];
          mean /= x.h * x.w;
          if (p.skip_scale) mean = mean * p.skip_scale[t] + p.skip_shift[t];
          gate += mean * p.gate_weight[row * c + t];
        }
        gate = 1 / (1 + std::exp(-gate));
        for (int64_t oy = 0; oy < out.h; oy++) {
          for (int64_t ox = 0; ox < out.w; ox++) {
            double sum = p.bias[row];
            for (int64_t t = 0; t < c; t++) {
              const auto [map, channel] = input(t);
              for (int tap = 0; tap < 9; tap++) {
                sum += map->at(i, channel, oy * p.stride + tap / 3 - 1, ox * p.stride + tap % 3 - 1) *
                       p.weight[(row * c + t) * 9 + tap];
              }
            }
            sum = p.skip_scale ? sum + gate * (x.at(i, row, oy, ox) * p.skip_scale[row] + p.skip_shift[row])
                               : 2 * gate * sum;
            sum = p.activation == Activation::kReLU ? std::max(sum, 0.) : sum / (1 + std::exp(-sum));
            if (p.out_scale) sum = sum * p.out_scale[result] + p.out_shift[result];
            out.values[((i * k + result) * out.h + oy) * out.w + ox] = sum;
          }
        }
      }
    }
    return out;
  }
};

struct Classifier {
  std::vector<float> weight, bias;
  Bytes packed{nullptr, std::free};
  const PackedHeader* header;

  Classifier(int64_t classes, int64_t channels)
      : weight(normal(classes * channels, .3f)), bias(normal(classes, .3f)) {
    const PackedHeader h = plan_classifier(classes, channels, kernels());
    packed = zeroed(h.total_bytes);
    pack_classifier(weight.data(), bias.data(), kernels(), h, packed.get(), parallel);
    header = &check_packed(packed.get(), h.total_bytes, kernels());
  }

  Map expected(const Map& x) const {
    Map out{x.n, static_cast<int64_t>(bias.size()), 1, 1, {}};
    const int64_t area = x.h * x.w;
    for (int64_t i = 0; i < x.n; i++) {
      for (int64_t k = 0; k < out.c; k++) {
        double sum = bias[k];
        for (int64_t at = 0; at < x.c * area; at++) {
          sum += x.values[i * x.c * area + at] / area * weight[k * x.c + at / area];
        }
        out.values.push_back(sum);
      }
    }
    return out;
  }
};

// A user's tensor on a heap block of exactly its size.
struct Tensor {
  std::vector<float> values;
  Strided view;

  Tensor(const Map& m, bool channels_last, bool filled) : values(m.n * m.c * m.h * m.w) {
    view = {values.data(), Dtype::kFloat, {m.n, m.c, m.h, m.w}, {m.c * m.h * m.w, m.h * m.w, m.w, 1}};
    if (channels_last) view.stride[1] = 1, view.stride[2] = m.w * m.c, view.stride[3] = m.c;
    for (size_t i = 0; filled && i < m.values.size(); i++) values[offset(i)] = m.values[i];
  }
  int64_t offset(int64_t i) const {
    int64_t at = 0;
    for (int d = 3; d >= 0; d--) at += i % view.size[d] * view.stride[d], i /= view.size[d];
    return at;
  }
};

Map random_map(int64_t n, int64_t c, int64_t h, int64_t w) {
  const std::vector<float> values = normal(n * c * h * w, 1);
  return {n, c, h, w, std::vector<double>(values.begin(), values.end())};
}

void run_threads(int threads, NetworkPlan::Body body, void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(body, context);
  body(context);
  for (std::thread& t : others) t.join();
}

void check(const std::vector<const Layer*>& layers, const std::vector<Step>& steps,
           const std::vector<Map>& inputs, const Map& expected, const Classifier* classifier = nullptr) {
  const bool channels_last = !classifier && pick({0, 1});
  Request request{.layers = {},
                  .classifier = {},
                  .steps = steps,
                  .inputs = {},
                  .threads = pick({1, 2, 3}),
                  .pooled = classifier != nullptr,
                  .direct = false};
  if (classifier) request.classifier = geometry_of(*classifier->header);
  std::vector<const PackedHeader*> headers;
  for (const Layer* l : layers) {
    headers.push_back(l->header);
    request.layers.push_back(geometry_of(*l->header));
  }
  std::vector<Tensor> tensors;
  for (const Map& m : inputs) {
    tensors.emplace_back(m, pick({0, 1}), true);
    request.inputs.push_back({m.n, m.c, m.h, m.w});
  }
  std::vector<Strided> views;
  for (const Tensor& t : tensors) views.push_back(t.view);
  Tensor result(expected, channels_last, false);
  request.direct = channels_last;
  plan_for(request, kernels())
      ->run(headers, classifier ? classifier->header : nullptr, views, {}, {result.view}, run_threads);
  // The floor is for results that happen to be small differences of values of about 1.
  double error = 0, norm = 1e-2 * expected.values.size();
  for (size_t i = 0; i < expected.values.size(); i++) {
    const double difference = result.values[result.offset(i)] - expected.values[i];
    error += difference * difference;
    norm += expected.values[i] * expected.values[i];
  }
  if (std::sqrt(error / norm) > 5e-6 || std::isnan(error)) {
    std::printf("%s: wrong result, error %.2e\n", kernels().name, std::sqrt(error / norm));
    std::exit(1);
  }
}

void one_layer() {
  const Kind kind = static_cast<Kind>(pick({0, 1, 2}));
  const int c = pick({1, 2, 3, 8, 9, 16, 20, 33}), k = pick({2, 6, 8, 16, 18, 34});
  const int64_t n = pick({1, 2, 3}), h = pick({1, 2, 3, 5, 7, 8, 14, 17, 30}),
                w = pick({1, 2, 4, 6, 9, 14, 30});
  const Layer layer(kind, c, kind == Kind::kRepVGG ? c : k, kind == Kind::kRepVGG ? 1 : pick({1, 2}));
  std::vector<Map> inputs = {random_map(n, c, h, w)};
  if (kind == Kind::kFusion) inputs.push_back(random_map(n, c, h, w));
  const Step step = kind == Kind::kFusion ? Step{0, 0, 1, 2} : Step{0, 0, -1, 1};
  check({&layer}, {step}, inputs, layer.expected(inputs[0], inputs.size() == 2 ? &inputs[1] : nullptr));
}

// Layers that run side by side, share buffers and merge.
void small_network() {
  const Layer stem(Kind::kDownsample, 3, 12, 2), skip(Kind::kRepVGG, 12, 12, 1),
      again(Kind::kRepVGG, 12, 12, 1), fine(Kind::kDownsample, 12, 20, 2),
      coarse(Kind::kDownsample, 12, 20, 2), deep(Kind::kRepVGG, 20, 20, 1), fusion(Kind::kFusion, 20, 24, 1),
      last(Kind::kDownsample, 24, 16, 2);
  // The largest maps go image by image.
  const Map image = random_map(pick({1, 2, 5}), 3, pick({17, 32, 61}), pick({20, 31, 120}));
  const Map a = stem.expected(image, nullptr), b = again.expected(skip.expected(a, nullptr), nullptr);
  const Map c = fine.expected(b, nullptr), d = deep.expected(coarse.expected(a, nullptr), nullptr);
  const Map features = last.expected(fusion.expected(d, &c), nullptr);
  const Classifier classifier(pick({10, 40, 67}), 16);
  const bool classify = pick({0, 1});
  check({&stem, &skip, &again, &fine, &coarse, &deep, &fusion, &last},
        {{0, 0, -1, 1},
         {1, 1, -1, 2},
         {2, 2, -1, 3},
         {3, 3, -1, 4},
         {4, 1, -1, 5},
         {5, 5, -1, 6},
         {6, 6, 4, 7},
         {7, 7, -1, 8}},
        {image}, classify ? classifier.expected(features) : features, classify ? &classifier : nullptr);
}

}  // namespace

int main(int, char** arguments) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
  int cases = 0;
  for (; std::chrono::steady_clock::now() < end || cases < 20; cases++)
    cases % 8 ? one_layer() : small_network();
  std::printf("%s: %d cases\n", kernels().name, cases);
  return run_direct(10) ? 0 : 1;
}
