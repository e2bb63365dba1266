#include "training.h"

#include <algorithm>

#include "../policy.h"
#include "training_parts.h"

namespace parnet::cpu {
namespace {

// Means and variances of parts: [part][pitch] sums and squared distances from the part's mean; count(part).
template <class Count>
void join_moments(const float* sums, const float* squares, int64_t parts, int64_t pitch, int channels,
                  Count count, float* mean, float* variance) {
  std::vector<double> total(channels), spread(channels);
  double all = 0;
  for (int64_t i = 0; i < parts; i++) {
    all += count(i);
    for (int c = 0; c < channels; c++) total[c] += sums[i * pitch + c];
  }
  for (int c = 0; c < channels; c++) total[c] /= all;
  for (int64_t i = 0; i < parts; i++) {
    const double n = count(i);
    for (int c = 0; c < channels; c++) {
      const double d = sums[i * pitch + c] / n - total[c];
      spread[c] += squares[i * pitch + c] + n * d * d;
    }
  }
  for (int c = 0; c < channels; c++) mean[c] = total[c], variance[c] = spread[c] / all;
}

struct Chunk {
  int image;
  int64_t first;
  int count;
};

struct Chunks {
  int64_t pixels, each, count;
  explicit Chunks(const PixelMap& map)
      : pixels(int64_t{map.rows} * map.cols), each(div_up(pixels, kPassPixels)), count(map.images * each) {}
  Chunk at(int64_t i) const {
    const int64_t first = i % each * kPassPixels;
    return {static_cast<int>(i / each), first, static_cast<int>(std::min(kPassPixels, pixels - first))};
  }
};

// Sums of chunks, [chunk][row][channel], to [row][image][channel].
void join_chunks(const float* from, const Chunks& chunks, int images, int rows, int channels, float scale,
                 float* to) {
  std::vector<double> total(channels);
  for (int row = 0; row < rows; row++) {
    for (int64_t image = 0; image < images; image++) {
      std::fill(total.begin(), total.end(), 0.);
      for (int64_t i = 0; i < chunks.each; i++) {
        const float* sums = from + ((image * chunks.each + i) * rows + row) * channels;
        for (int c = 0; c < channels; c++) total[c] += sums[c];
      }
      for (int c = 0; c < channels; c++) to[(row * images + image) * channels + c] = total[c] * scale;
    }
  }
}

}  // namespace

void convolve_map(const PixelMap& in, const float* weight, int stride, bool adjoint, bool add,
                  const PixelMap& out, float* mean, float* variance, const Kernels& k,
                  const Threads& threads) {
  const int64_t pixels = int64_t{out.images} * out.rows * out.cols;
  LayerParameters p =
      plain_layer(training_storage(pixels, out.channels, in.channels), stride, out.channels, in.channels);
  p.weight = weight;
  p.adjoint = adjoint;
  const PackedHeader sizes = plan_pack(p, k);
  const Scratch packed(sizes.total_bytes / 4);
  pack(p, k, sizes, packed.at(0), threads.parallel);

  PlainArgs a{};
  a.packed = reinterpret_cast<const PackedHeader*>(packed.at(0));
  a.in = in, a.out = out, a.add = add;
  const auto tiles = tiles_for({geometry_of(sizes), out.images, out.rows, out.cols, threads.count}, k);
  a.sum_channels = tiles->sum_channels;
  a.chunk_blocks = tiles->chunk_blocks;
  const int64_t pitch = int64_t{sizes.out_blocks} * k.lanes, parts = tiles->tiles.size();
  const Scratch moments(mean ? 2 * parts * pitch : 0);
  if (mean) a.sums = moments.at(0), a.squares = moments.at(parts * pitch);
  threads.parallel(tiles->sets.size(), [&](int64_t i) {
    const TileSet& set = tiles->sets[i];
    const Scratch scratch(tiles->v_floats + tiles->m_floats + tiles->u_floats);
    float *v = scratch.at(0), *m = v + tiles->v_floats;
    k.training->transform(a, set, 0, sizes.group_blocks, v);
    k.training->convolve(a, set, v, m, m + tiles->m_floats);
  });
  if (!mean) return;
  const auto count = [&](int64_t i) { return tiles->tiles[i].rows * tiles->tiles[i].cols; };
  join_moments(a.sums, a.squares, parts, pitch, out.channels, count, mean, variance);
}

void weight_gradient(const PixelMap& in, const PixelMap& gradient, int stride, float* to, const Kernels& k,
                     const Threads& threads) {
  const LayerParameters p = plain_layer(Storage::kTransformed, stride, gradient.channels, in.channels);
  const PackedHeader h = plan_pack(p, k);
  // The sets of tiles must not depend on the number of threads: sums are added block by block.
  const auto tiles = tiles_for({geometry_of(h), gradient.images, gradient.rows, gradient.cols, 1}, k);
  const int slots = slots_of(stride, h.in_channels), matrices = slots * slots;
  const int64_t block_floats = int64_t{matrices} * k.lanes * 2 * k.lanes;  // of products, for a panel
  // An item is a panel and some blocks of channels, whose products stay in L2.
  const int64_t items_wanted =
      std::max<int64_t>(div_up(h.group_blocks * block_floats * 4, kGradientBytes),
                        threads.count > 1 ? div_up(kGradientItems * threads.count, h.panels) : 1);
  const int parts = std::min<int64_t>(h.group_blocks, items_wanted);
  const int64_t each = div_up(h.group_blocks, parts), du_floats = each * block_floats;
  // Blocks of tiles whose transformed inputs are there together.
  const int64_t blocks = tiles->sets.size();
  const int64_t input_bytes =
      std::clamp(h.panels * h.group_blocks * block_floats * 8, kFewInputBytes, kInputBytes);
  const int64_t together = std::clamp<int64_t>(input_bytes / (tiles->v_floats * 4), 1, blocks);
  const bool at_once = together == blocks;
  const int64_t m_floats = tiles->m_floats / panels_at_once(k.lanes);  // of one panel
  const Scratch v(together * tiles->v_floats), all(at_once ? 0 : h.panels * parts * du_floats);
  const GradientArgs a{&h, in, gradient};
  std::vector<uint8_t> used(matrices, 0);
  for (int64_t start = 0; start < blocks; start += together) {
    const int64_t count = std::min(together, blocks - start);
    threads.parallel(count * h.group_blocks, [&](int64_t i) {
      const int64_t block = i / h.group_blocks, b = i % h.group_blocks;
      k.training->transform_input(a, tiles->sets[start + block], b, b + 1, v.at(block * tiles->v_floats));
    });
    threads.parallel(int64_t{h.panels} * parts, [&](int64_t i) {
      const int panel = i / parts, first = i % parts * each;
      const int last = std::min<int64_t>(first + each, h.group_blocks);
      if (first >= last) return;
      const Scratch scratch(m_floats + (at_once ? du_floats : 0));
      float *m = scratch.at(0), *du = at_once ? m + m_floats : all.at(i * du_floats);
      std::vector<uint8_t> written = used;
      for (int64_t block = 0; block < count; block++) {
        const TileTable& table = *tiles->sets[start + block].table;
        k.training->spread_tiles(a, tiles->sets[start + block], panel, m);
        for (int u = 0; u < table.num_uses; u++) {
          const int slot = table.uses[u].slot;
          k.training->multiply_transposed(a, table.uses[u], first, last, v.at(block * tiles->v_floats), m,
                                          du + slot * (last - first) * (block_floats / matrices),
                                          !written[slot]);
          written[slot] = 1;
        }
      }
      if (start + count == blocks) k.training->fold_gradient(a, du, written.data(), panel, first, last, to);
    });
    for (int64_t block = 0; block < count; block++) {
      const TileTable& table = *tiles->sets[start + block].table;
      for (int u = 0; u < table.num_uses; u++) used[table.uses[u].slot] = 1;
    }
  }
}

void convolve_points(const PixelMap& in, const float* weight, bool adjoint, bool add, const PixelMap& out,
                     float* mean, float* variance, const Kernels& k, const Threads& threads) {
  const int64_t panel = 2 * k.lanes, panels = div_up(out.channels, panel);
  const Scratch packed(panels * in.channels * panel);
  threads.parallel(panels, [&](int64_t p) {
    float* to = packed.at(p * in.channels * panel);
    const int64_t first = p * panel, count = std::min<int64_t>(panel, out.channels - first);
    for (int64_t c = 0; c < in.channels; c++, to += panel) {
      for (int64_t i = 0; i < panel; i++) {
        to[i] = i >= count ? 0
                : adjoint  ? weight[c * out.channels + first + i]
                           : weight[(first + i) * in.channels + c];
      }
    }
  });
  const Chunks chunks(out);
  const Scratch moments(mean ? 2 * chunks.count * out.channels : 0);
  float *sums = moments.at(0), *squares = sums + chunks.count * out.channels;
  const PointArgs a{in, out, packed.at(0), add};
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    const Scratch scratch(in.dtype == Dtype::kFloat ? 0 : kPassPixels * in.channels);
    k.training->pointwise(a, c.image, c.first, c.count, scratch.at(0));
    if (mean) {
      k.training->moments(out, c.image, c.first, c.count, sums + i * out.channels,
                          squares + i * out.channels);
    }
  });
  if (!mean) return;
  const auto count = [&](int64_t i) { return chunks.at(i).count; };
  join_moments(sums, squares, chunks.count, out.channels, out.channels, count, mean, variance);
}

void point_weight_gradient(const PixelMap& in, const PixelMap& gradient, float* to, const Kernels& k,
                           const Threads& threads) {
  const Chunks chunks(gradient);
  const int64_t panel = 2 * k.lanes, panels = div_up(gradient.channels, panel);
  const int64_t floats = panels * in.channels * panel;
  // Slices do not depend on the number of threads: their sums are added in order.
  const int64_t slices = std::min(kGradientSlices, chunks.count);
  const Scratch parts(slices * floats);
  const PointArgs a{in, gradient, nullptr, false};
  threads.parallel(slices, [&](int64_t s) {
    const int64_t from = chunks.count * s / slices, end = chunks.count * (s + 1) / slices;
    const Scratch scratch((div_up(in.channels, k.lanes) * k.lanes + panel) * kPointPixels);
    for (int64_t i = from; i < end; i++) {
      const Chunk c = chunks.at(i);
      k.training->point_gradient(a, c.image, c.first, c.count, parts.at(s * floats), i == from,
                                 scratch.at(0));
    }
  });
  threads.parallel(gradient.channels, [&](int64_t row) {
    const int64_t at = row / panel * in.channels * panel + row % panel;
    for (int64_t c = 0; c < in.channels; c++) {
      float sum = 0;
      for (int64_t s = 0; s < slices; s++) sum += *parts.at(s * floats + at + c * panel);
      to[row * in.channels + c] = sum;
    }
  });
}

void pool_map(const PixelMap& in, const PixelMap& out, const Kernels& k, const Threads& threads) {
  const Chunks chunks(out);
  const PointArgs a{in, out, nullptr, false};
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->pool(a, c.image, c.first, c.count);
  });
}

void map_moments(const PixelMap& map, float* image_means, float* mean, float* variance, const Kernels& k,
                 const Threads& threads) {
  const Chunks chunks(map);
  const Scratch scratch(2 * chunks.count * map.channels);
  float *sums = scratch.at(0), *squares = sums + chunks.count * map.channels;
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->moments(map, c.image, c.first, c.count, sums + i * map.channels,
                        mean ? squares + i * map.channels : nullptr);
  });
  join_chunks(sums, chunks, map.images, 1, map.channels, 1.f / chunks.pixels, image_means);
  if (!mean) return;
  const auto count = [&](int64_t i) { return chunks.at(i).count; };
  join_moments(sums, squares, chunks.count, map.channels, map.channels, count, mean, variance);
}

void combine_maps(const PassArgs& a, const Kernels& k, const Threads& threads) {
  const Chunks chunks(a.out[0]);
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->combine(a, c.image, c.first, c.count);
  });
}

void reduce_maps(const PassArgs& a, float* sums, const Kernels& k, const Threads& threads) {
  const Chunks chunks(a.g);
  const int rows = 1 + a.maps;
  const Scratch scratch(chunks.count * rows * a.g.channels);
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->reduce(a, c.image, c.first, c.count, scratch.at(i * rows * a.g.channels));
  });
  join_chunks(scratch.at(0), chunks, a.g.images, rows, a.g.channels, 1.f, sums);
}

void spread_maps(const PassArgs& a, const Kernels& k, const Threads& threads) {
  const Chunks chunks(a.g);
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->spread(a, c.image, c.first, c.count);
  });
}

void join_maps(const JoinArgs& a, const Kernels& k, const Threads& threads) {
  const Chunks chunks(a.joined);
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->join(a, c.image, c.first, c.count);
  });
}

void sum_joined(const JoinArgs& a, float* sums, const Kernels& k, const Threads& threads) {
  const Chunks chunks(a.joined);
  const int channels = a.map[0].channels;
  const Scratch scratch(chunks.count * 4 * channels);
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->join_sums(a, c.image, c.first, c.count, scratch.at(i * 4 * channels));
  });
  join_chunks(scratch.at(0), chunks, a.joined.images, 4, channels, 1.f, sums);
}

void separate_maps(const JoinArgs& a, const Kernels& k, const Threads& threads) {
  const Chunks chunks(a.joined);
  threads.parallel(chunks.count, [&](int64_t i) {
    const Chunk c = chunks.at(i);
    k.training->separate(a, c.image, c.first, c.count);
  });
}

}  // namespace parnet::cpu
