#include "pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace parnet::cpu {
namespace {

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

float* floats(void* base, int64_t offset) {
  return reinterpret_cast<float*>(static_cast<char*>(base) + offset);
}

// Where channel `c` of a group's weights comes from. Inputs of a fusion are interleaved: channel t of both
// together is channel t/2 of input t%2; group g multiplies t in [g*C, (g+1)*C).
struct GroupChannels {
  std::vector<BlockRef> blocks;   // [group_blocks]
  std::vector<int64_t> channels;  // [group_blocks*lanes]: index into the weight's second dimension, or -1
};

GroupChannels group_channels(const LayerParameters& p, int group, int lanes) {
  GroupChannels result;
  const int inputs = p.kind == Kind::kFusion ? 2 : 1;
  const int64_t channels = p.weight_channels;  // of one input and of one group
  for (int input = 0; input < inputs; input++) {
    // The channels of this input in this group are adjacent.
    const int64_t from = inputs == 1 ? 0 : div_up(group * channels - input, 2);
    const int64_t to = inputs == 1 ? channels : div_up((group + 1) * channels - input, 2);
    for (int64_t block = from / lanes; block * lanes < to; block++) {
      result.blocks.push_back({input, static_cast<int32_t>(block)});
      for (int64_t c = block * lanes; c < (block + 1) * lanes; c++) {
        const int64_t t = inputs * c + input - group * channels;
        result.channels.push_back(c >= from && c < to ? (inputs == 1 ? c : t) : -1);
      }
    }
  }
  return result;
}

}  // namespace

PackedHeader plan_pack(const LayerParameters& p, const Kernels& k) {
  PackedHeader h{};
  h.magic = kPackMagic;
  h.version = kPackVersion;
  h.lanes = k.lanes;
  h.kind = p.kind;
  h.activation = p.activation;
  h.storage = p.storage;
  h.stride = p.stride;
  h.groups = p.kind == Kind::kFusion ? 2 : 1;
  h.in_channels = p.weight_channels;
  h.out_channels = p.out_channels;
  h.in_blocks = div_up(h.in_channels, k.lanes);
  h.out_blocks = div_up(h.out_channels, k.lanes);
  h.panels = h.groups * div_up(h.out_channels / h.groups, 2 * k.lanes);
  h.group_blocks = 0;
  for (int g = 0; g < h.groups; g++) {
    h.group_blocks = std::max<int>(h.group_blocks, group_channels(p, g, k.lanes).blocks.size());
  }
  const int64_t panel = 2 * k.lanes, channels = int64_t{h.group_blocks} * k.lanes;
  h.total_bytes = div_up(sizeof(PackedHeader), 64) * 64;
  const auto reserve = [&](int64_t count) {
    const int64_t at = h.total_bytes;
    h.total_bytes += div_up(count * 4, 64) * 64;
    return at;
  };
  h.block_list = reserve(h.groups * h.group_blocks * 2);
  if (p.kind != Kind::kPlain) {
    h.gate_weight = reserve(h.panels * channels * panel);
    h.gate_bias = reserve(h.panels * panel);
    h.bias = reserve(h.panels * panel);
  }
  if (p.kind == Kind::kRepVGG) {
    h.skip_scale = reserve(h.panels * panel);
    h.skip_shift = reserve(h.panels * panel);
  }
  if (p.out_scale || p.out_shift) {
    h.out_scale = reserve(int64_t{h.out_blocks} * k.lanes);
    h.out_shift = reserve(int64_t{h.out_blocks} * k.lanes);
  }
  if (p.kind == Kind::kDownsample && h.in_channels <= kStemChannels) {
    h.stem_weight = reserve(h.panels * h.in_channels * 9 * panel);
  }
  h.weight = reserve(h.panels * channels * panel * values_per_filter(h));
  return h;
}

void pack(const LayerParameters& p, const Kernels& k, const PackedHeader& h, void* to,
          const Parallel& parallel) {
  std::memcpy(to, &h, sizeof(h));
  const int lanes = k.lanes, panel = 2 * lanes;
  const int64_t channels = int64_t{h.group_blocks} * lanes, group_outputs = h.out_channels / h.groups;
  std::vector<GroupChannels> groups;
  auto* refs = reinterpret_cast<BlockRef*>(static_cast<char*>(to) + h.block_list);
  for (int g = 0; g < h.groups; g++) {
    groups.push_back(group_channels(p, g, lanes));
    // If a group's channels do not start at a block's, groups can read different numbers of blocks. The
    // shorter one reads a block once more, with zero weights.
    groups[g].blocks.resize(h.group_blocks, groups[g].blocks[0]);
    groups[g].channels.resize(channels, -1);
    std::copy(groups[g].blocks.begin(), groups[g].blocks.end(), refs + g * h.group_blocks);
  }
  if (h.out_scale) {
    for (int64_t c = 0; c < h.out_channels; c++) {
      floats(to, h.out_scale)[c] = p.out_scale ? p.out_scale[c] : 1.f;
      floats(to, h.out_shift)[c] = p.out_shift ? p.out_shift[c] : 0.f;
    }
  }
  parallel(h.panels, [&](int64_t index) {
    const int group = index % h.groups;
    const int64_t first = index / h.groups * panel, count = std::min<int64_t>(panel, group_outputs - first);
    const int64_t output = group * group_outputs + first;  // row of the weight
    const std::vector<int64_t>& source = groups[group].channels;
    float* gate = floats(to, h.gate_weight) + index * channels * panel;
    for (int64_t i = 0; i < count && h.kind != Kind::kPlain; i++) {
      const int64_t row = output + i;
      double shift = p.gate_bias ? p.gate_bias[row] : 0.;
      for (int64_t c = 0; c < channels; c++) {
        if (source[c] < 0) continue;
        const double w = p.gate_weight[row * p.weight_channels + source[c]];
        // The gate of a RepVGG block pools skip_scale*x + skip_shift.
        const bool affine = p.kind == Kind::kRepVGG;
        gate[c * panel + i] = affine ? w * p.skip_scale[source[c]] : w;
        if (affine) shift += w * p.skip_shift[source[c]];
      }
      const int64_t at = index * panel + i;
      floats(to, h.gate_bias)[at] = shift;
      floats(to, h.bias)[at] = p.bias[row];
      if (h.skip_scale) {
        floats(to, h.skip_scale)[at] = p.skip_scale[row];
        floats(to, h.skip_shift)[at] = p.skip_shift[row];
      }
    }
    const auto taps = [&](float* to, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        if (source[c] < 0) continue;
        for (int64_t i = 0; i < count; i++) {
          const float* w = p.weight + (p.adjoint ? source[c] * p.out_channels + output + i
                                                 : (output + i) * p.weight_channels + source[c]) *
                                          9;
          for (int tap = 0; tap < 9; tap++) {
            to[((c - begin) * 9 + tap) * panel + i] = w[p.adjoint && p.stride == 1 ? 8 - tap : tap];
          }
        }
      }
    };
    if (h.stem_weight) {
      taps(floats(to, h.stem_weight) + index * h.in_channels * 9 * panel, 0, h.in_channels);
    }
    const int slots = slots_of(h.stride, h.in_channels);
    float* weight = floats(to, h.weight) + index * channels * panel * values_per_filter(h);
    if (h.storage == Storage::kTaps) {
      std::fill_n(weight, channels * panel * 9, 0.f);
      return taps(weight, 0, channels);
    }
    // A block of channels at a time, so that the taps stay in cache.
    std::vector<float> scratch(lanes * (9 + 3) * panel + 16);
    float* block = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64 / 4;
    float* rows = block + lanes * 9 * panel;
    for (int64_t c = 0; c < channels; c += lanes) {
      std::fill_n(block, lanes * 9 * panel, 0.f);
      taps(block, c, c + lanes);
      for (int row = 0; row < slots; row++) {
        if (h.storage == Storage::kRows) {
          const int64_t at = place_of_row(h.panels, index, row) * channels + c;
          k.expand_rows(block, lanes, floats(to, h.weight) + at * 3 * panel, h.stride, row);
        } else {
          k.expand_rows(block, lanes, rows, h.stride, row);
          k.expand_columns(rows, lanes, weight + (row * slots * channels + c) * panel, channels * panel,
                           h.stride, slots);
        }
      }
    }
  });
}

PackedHeader plan_classifier(int64_t classes, int64_t channels, const Kernels& k) {
  PackedHeader h{};
  h.magic = kPackMagic;
  h.version = kPackVersion;
  h.lanes = k.lanes;
  h.kind = Kind::kClassifier;
  h.groups = h.stride = 1;
  h.in_channels = channels;
  h.out_channels = classes;
  h.in_blocks = h.group_blocks = div_up(channels, k.lanes);
  h.out_blocks = div_up(classes, k.lanes);
  h.panels = div_up(classes, 2 * k.lanes);
  h.bias = div_up(sizeof(PackedHeader), 64) * 64;
  h.weight = h.bias + div_up(int64_t{h.panels} * 2 * k.lanes * 4, 64) * 64;
  h.total_bytes = h.weight + int64_t{h.panels} * 2 * k.lanes * h.in_blocks * k.lanes * 4;
  return h;
}

void pack_classifier(const float* weight, const float* bias, const Kernels& k, const PackedHeader& h,
                     void* to, const Parallel& parallel) {
  std::memcpy(to, &h, sizeof(h));
  const int64_t panel = 2 * k.lanes;
  parallel(h.panels, [&](int64_t index) {
    float* w = floats(to, h.weight) + index * panel * h.in_blocks * k.lanes;
    for (int64_t i = 0; i < panel && index * panel + i < h.out_channels; i++) {
      const int64_t row = index * panel + i;
      floats(to, h.bias)[row] = bias ? bias[row] : 0.f;
      for (int64_t c = 0; c < h.in_channels; c++) w[c * panel + i] = weight[row * h.in_channels + c];
    }
  });
}

const PackedHeader& check_packed(const void* data, int64_t bytes, const Kernels& k) {
  const auto& h = *static_cast<const PackedHeader*>(data);
  if (reinterpret_cast<uintptr_t>(data) % 64 != 0) {
    throw std::runtime_error("packed weights must be 64-byte aligned; do not slice or memory-map them");
  }
  if (bytes < static_cast<int64_t>(sizeof(PackedHeader)) || h.magic != kPackMagic || h.total_bytes > bytes) {
    throw std::runtime_error("packed must be made by parnet::_cpu_pack");
  }
  if (h.version != kPackVersion || h.lanes != k.lanes) {
    throw std::runtime_error("packed weights are for vectors of " + std::to_string(h.lanes) +
                             " floats, format " + std::to_string(h.version) + "; this process runs " +
                             k.name + " kernels, " + std::to_string(k.lanes) + " floats, format " +
                             std::to_string(kPackVersion) + ": pack, or export, again here");
  }
  return h;
}

}  // namespace parnet::cpu
