#include "../policy.h"
#include "training.h"
#include "training_parts.h"

namespace parnet::cpu {

void add_strided_input_gradient(const PixelMap& gradient, const float* weight, const PixelMap& to,
                                const Kernels& k, const Threads& threads) {
  const int64_t pixels = int64_t{gradient.images} * gradient.rows * gradient.cols;
  LayerParameters p = plain_layer(training_storage(pixels, to.channels, gradient.channels), 2, to.channels,
                                  gradient.channels);
  p.weight = weight;
  p.adjoint = true;
  const PackedHeader h = plan_pack(p, k);
  const Scratch packed(h.total_bytes / 4);
  pack(p, k, h, packed.at(0), threads.parallel);

  PlainArgs a{};
  a.packed = reinterpret_cast<const PackedHeader*>(packed.at(0));
  a.in = gradient, a.out = to, a.add = true;
  // Windows overlap: what is added to a pixel, and in which order, must not depend on the number of threads.
  const auto tiles = tiles_for({geometry_of(h), gradient.images, gradient.rows, gradient.cols, 1}, k);
  a.sum_channels = tiles->sum_channels;
  a.chunk_blocks = tiles->chunk_blocks;
  // Sets with tiles of the same images go one after the other; such groups of sets, and panels, side by side.
  std::vector<int64_t> groups;  // the first set of each
  for (size_t i = 0; i < tiles->sets.size(); i++) {
    if (i == 0 ||
        tiles->sets[i - 1].tiles[tiles->sets[i - 1].count - 1].image != tiles->sets[i].tiles[0].image) {
      groups.push_back(i);
    }
  }
  const int64_t all = groups.size();
  groups.push_back(tiles->sets.size());
  int64_t longest = 1;
  for (int64_t i = 0; i < all; i++) longest = std::max(longest, groups[i + 1] - groups[i]);
  const int64_t together = std::clamp<int64_t>(kInputBytes / (longest * tiles->v_floats * 4), 1, all);
  const int step = panels_at_once(k.lanes);
  const int64_t steps = div_up(h.panels, step);
  const Scratch v(together * longest * tiles->v_floats);
  for (int64_t start = 0; start < all; start += together) {
    const int64_t end = std::min(start + together, all), first = groups[start];
    threads.parallel((groups[end] - first) * h.group_blocks, [&](int64_t i) {
      const int64_t set = i / h.group_blocks, b = i % h.group_blocks;
      k.training->transform_strided_gradient(a, tiles->sets[first + set], b, b + 1,
                                             v.at(set * tiles->v_floats));
    });
    threads.parallel((end - start) * steps, [&](int64_t i) {
      const int64_t group = start + i / steps;
      const int panel = i % steps * step, last = std::min(panel + step, h.panels);
      const Scratch scratch(tiles->m_floats + tiles->u_floats);
      for (int64_t set = groups[group]; set < groups[group + 1]; set++) {
        k.training->add_strided_gradient(a, tiles->sets[set], v.at((set - first) * tiles->v_floats), panel,
                                         last, scratch.at(0), scratch.at(tiles->m_floats));
      }
    });
  }
}

}  // namespace parnet::cpu
