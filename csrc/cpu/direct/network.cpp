#include "network.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../waiting.h"

namespace parnet::cpu::direct {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kSlack = 256;  // bytes that kernels may read around a map
static_assert(kReadBeyond <= kSlack / 2);
constexpr int64_t kItemsPerThread = 8;  // of a layer: few enough to use weights often, enough to share out

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The start of part i of `parts` of `count`, as equal as they can be.
int64_t part(int64_t count, int64_t parts, int64_t i) { return count * i / parts; }
// The same of a map's rows, of which kernels multiply `map_rows` at a time.
int64_t row_part(int64_t rows, int64_t map_rows, int64_t parts, int64_t i) {
  return std::min(rows, part(div_up(rows, map_rows), parts, i) * map_rows);
}

}  // namespace

Network::Network(std::vector<Step> steps, const std::array<int64_t, 4>& shape, int threads, const Kernels& k)
    : steps_(std::move(steps)), threads_(threads), kernels_(k) {
  plan_values(shape);
  plan_stages();
  plan_memory();
}

void Network::plan_values(const std::array<int64_t, 4>& shape) {
  values_.resize(steps_.size() + 1);
  values_[0].shape = shape;
  for (size_t i = 0; i < steps_.size(); i++) {
    const Step& s = steps_[i];
    const Layer& l = s.layer;
    const auto known = [&](int64_t v) { return v >= 0 && v <= static_cast<int64_t>(i); };
    if (s.output != static_cast<int64_t>(i) + 1 || !known(s.input) || (l.inputs == 2) != (s.other >= 0) ||
        (s.other >= 0 && !known(s.other)) || l.last != (i + 1 == steps_.size())) {
      throw std::runtime_error("the program's values are out of order");
    }
    Value& out = values_[s.output];
    for (const int64_t v : {s.input, s.other}) {
      if (v < 0) continue;
      const Value& in = values_[v];
      if (in.shape[1] != l.in_channels || in.shape != values_[s.input].shape) {
        throw std::runtime_error("a layer's input has another shape than the layer");
      }
      out.level = std::max(out.level, in.level + 1);
    }
    const auto& in = values_[s.input].shape;
    out.shape = {in[0], l.out_channels, div_up(in[2], l.stride), div_up(in[3], l.stride)};
  }
  for (const Step& s : steps_) {
    for (const int64_t v : {s.input, s.other}) {
      if (v >= 0) values_[v].last_level = std::max(values_[v].last_level, values_[s.output].level);
    }
  }
  std::stable_sort(steps_.begin(), steps_.end(), [&](const Step& a, const Step& b) {
    return values_[a.output].level < values_[b.output].level;
  });
}

void Network::plan_stages() {
  const auto add = [&](Stage::Work work, int step, int64_t images, int64_t rows, int64_t panels,
                       bool after_all) {
    stages_.push_back({work, step, images, rows, panels, items_, after_all});
    if (after_all) barriers_.push_back(items_);
    items_ += images * rows * panels;
  };
  Value& x = values_[0];
  const int64_t images = x.shape[0], wanted = div_up(kItemsPerThread * threads_, images);
  const int64_t entering = std::min(x.shape[2], wanted);
  x.sum_rows = sums_by_row() ? x.shape[2] : entering;
  add(Stage::Work::kEnter, -1, images, entering, 1, true);
  for (size_t first = 0, last; first < steps_.size(); first = last) {
    const int level = values_[steps_[first].output].level;
    for (last = first; last < steps_.size() && values_[steps_[last].output].level == level;) last++;
    for (size_t i = first; i < last; i++) {
      const int64_t pairs = steps_[i].layer.panels / steps_[i].layer.groups;
      add(Stage::Work::kGate, i, images, 1, std::min<int64_t>(pairs, div_up(threads_, images)), i == first);
    }
    for (size_t i = first; i < last; i++) {
      const Layer& l = steps_[i].layer;
      Value& out = values_[steps_[i].output];
      const int64_t pairs = l.panels / l.groups, weights = l.panels * l.panel_bytes;
      const int64_t pixels = out.shape[2] * out.shape[3] * l.in_channels * l.stride * l.stride;
      // What is larger is split, so that each part of it is read by one thread only.
      const int64_t most_rows = div_up(out.shape[2], kernels_.map_rows);
      int64_t panels = 1, rows = 1;
      if (weights > pixels) {
        panels = std::min(pairs, wanted);
        rows = std::min(most_rows, div_up(wanted, panels));
      } else {
        rows = std::min(most_rows, wanted);
        panels = std::min(pairs, div_up(wanted, rows));
      }
      out.sum_rows = sums_by_row() ? out.shape[2] : rows;
      add(Stage::Work::kConvolve, i, images, rows, panels, i == first);
    }
  }
}

int64_t Network::reserve(int64_t bytes) {
  const int64_t at = bytes_;
  bytes_ += div_up(bytes, kAlign) * kAlign;
  return at;
}

// Pixels in bfloat16 are whole panels: other channels than a pixel's own would be multiplied with zeros,
// which does not make zero of infinity.
int64_t Network::pixel_bytes(const Value& v) const {
  return kernels_.element == Element::kByte ? div_up(v.shape[1], 4) * 4
                                            : div_up(v.shape[1], kPanel) * kPanel * 2;
}

// Maps whose last readers' level is past are overwritten by later levels' results.
void Network::plan_memory() {
  const int64_t images = values_[0].shape[0];
  finite_ = reserve(images * sizeof(int32_t));
  struct Room {
    int64_t start, bytes;
    int free_from;  // level
  };
  std::vector<Room> rooms;
  const auto place = [&](Value& v) {
    const auto& s = v.shape;
    v.sums = reserve(images * v.sum_rows * s[1] * sizeof(int32_t));
    v.bytes = div_up((s[2] + 2) * (s[3] + 2) * pixel_bytes(v) + kSlack, kAlign) * kAlign;
    const int64_t whole = v.bytes * images;
    Room* best = nullptr;
    for (Room& r : rooms) {
      if (r.free_from <= v.level && r.bytes >= whole && (!best || r.bytes < best->bytes)) best = &r;
    }
    if (!best) {
      rooms.push_back({reserve(whole), whole, 0});
      best = &rooms.back();
    }
    v.start = best->start;
    best->free_from = v.last_level + 1;
  };
  place(values_[0]);
  for (const Step& s : steps_) {
    if (!s.layer.last) place(values_[s.output]);
    gates_.push_back(reserve(images * 3 * s.layer.panels * kPanel * sizeof(float)));
    means_bytes_ =
        std::max<int64_t>(means_bytes_, int64_t{s.layer.inputs} * s.layer.in_channels * sizeof(float));
  }
  means_bytes_ = div_up(means_bytes_, kAlign) * kAlign;
  means_ = reserve(threads_ * means_bytes_);
}

Map Network::map_of(const Value& v, char* workspace, int64_t image) const {
  const int64_t pixel = pixel_bytes(v), row = (v.shape[3] + 2) * pixel;
  auto* base = reinterpret_cast<uint8_t*>(workspace) + v.start + image * v.bytes + kSlack / 2;
  return {base + row + pixel, v.bytes, row, pixel};
}

class Network::Run {
 public:
  Run(const Network& n, const void* x, float* result, char* workspace)
      : n_(n), x_(x), result_(result), workspace_(workspace), patience_(n.threads_) {
    const int64_t images = n.values_[0].shape[0];
    std::fill_n(reinterpret_cast<int32_t*>(workspace + n.finite_), images, 1);
  }

  void work() {
    const int worker = workers_++;
    float* means = reinterpret_cast<float*>(workspace_ + n_.means_ + worker * n_.means_bytes_);
    size_t stage = 0;
    int64_t needed = 0;  // items done before this stage may start
    for (;;) {
      const int64_t item = next_++;
      if (item >= n_.items_) return;
      while (stage + 1 < n_.stages_.size() && item >= n_.stages_[stage + 1].first_item) {
        stage++;
        if (n_.stages_[stage].after_all) needed = n_.stages_[stage].first_item;
      }
      patience_.wait(done_, needed);
      execute(n_.stages_[stage], item - n_.stages_[stage].first_item, means);
      const int64_t done = done_.fetch_add(1, std::memory_order_acq_rel) + 1;
      if (std::binary_search(n_.barriers_.begin(), n_.barriers_.end(), done)) done_.notify_all();
    }
  }

 private:
  void execute(const Stage& s, int64_t item, float* means) {
    const int64_t panel = item % s.panels, row = item / s.panels % s.rows, image = item / s.panels / s.rows;
    switch (s.work) {
      case Stage::Work::kEnter:
        return enter(s, image, row);
      case Stage::Work::kGate:
        return gate(s, image, panel, means);
      case Stage::Work::kConvolve:
        return convolve(s, image, row, panel);
    }
  }

  int32_t* sums_of(const Value& v, int64_t image, int64_t row) const {
    return reinterpret_cast<int32_t*>(workspace_ + v.sums) + (image * v.sum_rows + row) * v.shape[1];
  }
  Gates gates_of(int step, int64_t image) const {
    const int64_t count = n_.steps_[step].layer.panels * kPanel;
    float* from = reinterpret_cast<float*>(workspace_ + n_.gates_[step]) + image * 3 * count;
    return {from, from + count, from + 2 * count};
  }

  void enter(const Stage& s, int64_t image, int64_t chunk) {
    const Value& v = n_.values_[0];
    const int64_t channels = v.shape[1], height = v.shape[2], width = v.shape[3];
    const Layer& reader = n_.steps_[0].layer;  // all readers of the map know its scale
    const Map to = n_.map_of(v, workspace_, image);
    const int64_t item_bytes =
        n_.kernels_.element == Element::kByte ? sizeof(float) : bytes_of(Element::kBfloat16);
    const int64_t first_row = part(height, s.rows, chunk), last_row = part(height, s.rows, chunk + 1);
    const int64_t sum_step = n_.sums_by_row() ? channels : 0;
    int32_t* sums = sums_of(v, image, n_.sums_by_row() ? first_row : chunk);
    std::fill_n(sums, sum_step ? channels * (last_row - first_row) : channels, 0);
    bool finite = true;
    for (int64_t row = first_row; row < last_row; row++, sums += sum_step) {
      uint8_t* line = to.base + row * to.row;
      const char* from =
          static_cast<const char*>(x_) + (image * height + row) * width * channels * item_bytes;
      finite &= n_.kernels_.enter({from, line, to.pixel, static_cast<int32_t>(width),
                                   static_cast<int32_t>(channels), 1.f / reader.in_scale,
                                   static_cast<float>(reader.in_zero), sums});
      std::memset(line - to.pixel, reader.in_zero, to.pixel);
      std::memset(line + width * to.pixel, reader.in_zero, to.pixel);
      if (row == 0) std::memset(line - to.row - to.pixel, reader.in_zero, to.row);
      if (row == height - 1) std::memset(line + to.row - to.pixel, reader.in_zero, to.row + kReadBeyond);
    }
    if (!finite) not_finite(image);
  }

  void not_finite(int64_t image) {
    auto* flag = reinterpret_cast<int32_t*>(workspace_ + n_.finite_) + image;
    __atomic_store_n(flag, 0, __ATOMIC_RELAXED);
  }

  void gate(const Stage& s, int64_t image, int64_t chunk, float* means) {
    const Step& step = n_.steps_[s.step];
    const Layer& l = step.layer;
    GateArgs a{};
    a.layer = &l;
    const Value& in = n_.values_[step.input];
    a.pixels = in.shape[2] * in.shape[3];
    for (int j = 0; j < l.inputs; j++) {
      const Value& v = n_.values_[j ? step.other : step.input];
      a.sums[j] = sums_of(v, image, 0), a.sum_rows[j] = v.sum_rows, a.channels[j] = v.shape[1];
    }
    a.gates = gates_of(s.step, image);
    a.means = means;
    const int64_t pairs = l.panels / l.groups;
    const int first = part(pairs, s.panels, chunk) * l.groups,
              last = part(pairs, s.panels, chunk + 1) * l.groups;
    if (!n_.kernels_.gate(a, first, last)) not_finite(image);
  }

  void convolve(const Stage& s, int64_t image, int64_t row_chunk, int64_t panel_chunk) {
    const Step& step = n_.steps_[s.step];
    const Layer& l = step.layer;
    const Value& out = n_.values_[step.output];
    ConvArgs a{};
    a.layer = &l;
    a.in[0] = n_.map_of(n_.values_[step.input], workspace_, image);
    if (step.other >= 0) a.in[1] = n_.map_of(n_.values_[step.other], workspace_, image);
    a.gates = gates_of(s.step, image);
    a.out_rows = out.shape[2], a.out_cols = out.shape[3];
    const int64_t pairs = l.panels / l.groups, height = out.shape[2];
    const int first = part(pairs, s.panels, panel_chunk) * l.groups,
              last = part(pairs, s.panels, panel_chunk + 1) * l.groups;
    const int64_t map_rows = n_.kernels_.map_rows;
    const int first_row = row_part(height, map_rows, s.rows, row_chunk),
              last_row = row_part(height, map_rows, s.rows, row_chunk + 1);
    if (l.last) {
      a.out_floats = result_ + image * height * out.shape[3] * out.shape[1];
    } else {
      a.out = n_.map_of(out, workspace_, image);
      const int64_t channels = out.shape[1], from = std::min<int64_t>(channels, first * kPanel),
                    to = std::min<int64_t>(channels, last * kPanel);
      int32_t* sums = sums_of(out, image, n_.sums_by_row() ? first_row : row_chunk);
      a.sums = sums, a.sum_step = n_.sums_by_row() ? channels : 0;
      for (int row = first_row; row < (a.sum_step ? last_row : first_row + 1); row++, sums += channels) {
        std::fill(sums + from, sums + to, 0);
      }
    }
    n_.kernels_.convolve(a, first_row, last_row, first, last);
  }

  const Network& n_;
  const void* x_;
  float* result_;
  char* workspace_;
  Patience patience_;
  std::atomic<int> workers_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

void Network::run(const void* x, float* result, char* workspace, RunParallel parallel) const {
  Run run(*this, x, result, workspace);
  parallel(threads_, [](void* context) { static_cast<Run*>(context)->work(); }, &run);
  const auto shape = result_shape();
  const int64_t floats = shape[1] * shape[2] * shape[3];
  const auto* finite = reinterpret_cast<const int32_t*>(workspace + finite_);
  for (int64_t image = 0; image < shape[0]; image++) {
    if (!finite[image]) {
      std::fill_n(result + image * floats, floats, std::numeric_limits<float>::quiet_NaN());
    }
  }
}

}  // namespace parnet::cpu::direct
