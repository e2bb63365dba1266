#include "plan.h"

#include <algorithm>
#include <limits>

namespace parnet::cpu {
namespace {

// The tiles along one direction: first output, kind of scheme, outputs in the map.
struct Segment {
  int start, kind, size;
};

// Stride 1: as many of `largest` as fit, then the smallest of 2, 4 and `largest` that covers the rest. Stride
// 2: `largest`, then the rest exactly.
std::vector<Segment> segments(int length, int stride, int largest) {
  std::vector<Segment> result;
  for (int at = 0; at < length;) {
    const int rest = length - at;
    if (stride == 1) {
      const int step = rest <= 2 ? 2 : rest <= 4 ? 4 : largest;
      result.push_back({at, step / 2 - 1, std::min(rest, step)});
      at += step;
    } else {
      const int step = std::min(rest, largest);
      result.push_back({at, step - 1, step});
      at += step;
    }
  }
  return result;
}

const Scheme& scheme(int stride, int kind) { return kSchemes[stride - 1][kind]; }

int div_up(int a, int b) { return (a + b - 1) / b; }

// Strips into which the rows of one weight matrix are divided. Each strip fetches a part of the next matrix,
// at most one cache line for each channel, so that more of them fetch more evenly: two passes of 6 rows
// stream weights 15 % faster than one of 12.
int strips_of(int rows, const Kernels& k) {
  const int lines_per_channel = 2 * k.lanes * 4 / 64;
  return std::max(div_up(rows, k.max_rows), std::min(lines_per_channel, std::max(1, rows / kMinStripRows)));
}

}  // namespace

Geometry geometry_of(const PackedHeader& h) {
  return {h.kind,         h.storage,   h.stride,     h.groups,       h.in_channels,
          h.out_channels, h.in_blocks, h.out_blocks, h.group_blocks, h.panels};
}

const TileTable* TilePlan::table_of(const Geometry& g, const Kernels& k, const Tile* tiles, int count) {
  // First the rows of each matrix are counted, and each transformed input gets its row; then the rows of all
  // matrices are laid out one behind the other.
  const int axis = slots_of(g.stride, g.in_channels), matrices = axis * axis;
  std::vector<int> rows(matrices, 0);
  auto table = std::make_unique<Table>();
  std::vector<int32_t>&v = table->v_offset, &step = table->v_step, &m = table->m_offset;
  v.assign(count * kMaxTransforms, 0);
  step.assign(count * kMaxTransforms, 0);
  m.assign(count * kMaxTransforms, 0);
  std::vector<int> slot_of(count * kMaxTransforms, -1);
  for (int t = 0; t < count; t++) {
    int at = t * kMaxTransforms;
    const Scheme &rows_of = scheme(g.stride, tiles[t].row_kind),
                 &cols_of = scheme(g.stride, tiles[t].col_kind);
    for (int i = 0; i < rows_of.values; i++) {
      for (int j = 0; j < cols_of.values; j++) {
        slot_of[at] = rows_of.slot[i] * axis + cols_of.slot[j];
        m[at] = rows[slot_of[at]]++;
        at++;
      }
    }
  }
  std::vector<int> use_of(matrices, -1);
  const int blocks = g.groups * g.group_blocks;
  const auto floats = [&](int rows) { return strip_floats(rows, blocks, k.lanes); };
  int64_t v_floats = 0;
  int m_rows = 0, slot_rows = 0;
  for (int slot = 0; slot < matrices; slot++) {
    if (!rows[slot]) continue;
    if (table->uses.empty() || table->uses.back().slot / axis != slot / axis) slot_rows++;
    use_of[slot] = table->uses.size();
    const int count =
        transforms_at_call(g.storage) ? div_up(rows[slot], k.max_rows) : strips_of(rows[slot], k);
    table->uses.push_back({slot, rows[slot], m_rows, count, static_cast<int32_t>(v_floats)});
    const int small = rows[slot] / count, bigger = rows[slot] % count;
    v_floats += bigger * floats(small + 1) + (count - bigger) * floats(small);
    m_rows += rows[slot];
    m_rows += m_rows % 2 == 0;  // an odd number of rows: no power of two between the products of two matrices
  }
  const int panel = 2 * k.lanes;
  for (size_t i = 0; i < slot_of.size(); i++) {
    if (slot_of[i] < 0) continue;
    const MatrixUse& use = table->uses[use_of[slot_of[i]]];
    const int row = m[i], small = use.rows / use.strips, bigger = use.rows % use.strips;
    const int in_bigger = bigger * (small + 1);
    const bool big = row < in_bigger;
    const int height = big ? small + 1 : small, from = big ? row : row - in_bigger;
    v[i] = use.first_value + (big ? 0 : bigger * floats(small + 1)) + from / height * floats(height) +
           from % height * k.lanes;
    step[i] = height * k.lanes;
    m[i] = (use.first_row + row) * panel;
  }
  table->view = {
      v.data(), step.data(), m.data(), table->uses.data(), static_cast<int32_t>(table->uses.size()),
      m_rows,   slot_rows,   v_floats};
  tables_.push_back(std::move(table));
  return &tables_.back()->view;
}

TilePlan::TilePlan(const Geometry& g, const Kernels& k, int64_t images, int out_rows, int out_cols,
                   int threads)
    : threads(threads) {
  const int largest = largest_tile(g.stride, g.storage, g.in_channels, g.out_channels,
                                   images * out_rows * out_cols, k.min_pixels_6);
  sum_channels = largest == 6    ? kSumChannels6
                 : g.stride == 1 ? kSumChannels4
                                 : std::numeric_limits<int>::max();
  const auto rows = segments(out_rows, g.stride, largest), cols = segments(out_cols, g.stride, largest);
  tiles_per_image = rows.size() * cols.size();
  for (int64_t image = 0; image < images; image++) {
    for (const Segment& row : rows) {
      for (const Segment& col : cols) {
        tiles.push_back({static_cast<int32_t>(image), row.start, col.start,
                         static_cast<int32_t>(tiles.size()), static_cast<uint8_t>(row.kind),
                         static_cast<uint8_t>(col.kind), static_cast<uint8_t>(row.size),
                         static_cast<uint8_t>(col.size)});
      }
    }
  }
  // A set has tiles of one image, unless several images fit into one: then as many as leave all threads as
  // many sets.
  const int most = std::max(1, kTilesOfSet / tiles_per_image);
  int whole = most;
  const auto uneven = [&](int64_t sets) { return sets % threads && sets < 2 * threads; };
  while (images > most && whole > div_up(most, 2) && uneven(div_up(images, whole))) whole--;
  whole = div_up(images, div_up(images, whole));
  const int unit = whole * tiles_per_image, units = div_up(tiles.size(), unit);
  const int few = g.stride == 2 && largest == 4 ? kFewStridedTiles : kFewTiles;
  v_floats = m_floats = 0;
  sets.reserve(tiles.size());
  for (int64_t start = 0; start < static_cast<int64_t>(tiles.size()); start += unit) {
    const int count = std::min<int64_t>(unit, tiles.size() - start);
    const int parts = std::max(div_up(count, kTilesOfSet), std::min(div_up(threads, units), count / few));
    for (int part = 0, at = 0; part < parts; part++) {
      const int size = count / parts + (part < count % parts);
      const Tile* first = &tiles[start + at];
      const TileTable* table = nullptr;
      for (const TileSet& b : sets) {
        if (b.count == size && std::equal(first, first + size, b.tiles, [](const Tile& x, const Tile& y) {
              return x.row_kind == y.row_kind && x.col_kind == y.col_kind;
            })) {
          table = b.table;
          break;
        }
      }
      if (!table) table = table_of(g, k, first, size);
      sets.push_back({first, table, size});
      v_floats = std::max(v_floats, table->v_floats);
      m_floats = std::max(m_floats, int64_t{table->m_rows} * 2 * k.lanes);
      at += size;
    }
  }
  m_floats *= g.groups == 1 ? panels_at_once(k.lanes) : 2;
  const int64_t block_bytes = int64_t{3} * k.lanes * 2 * k.lanes * 4;
  chunk_blocks = div_up(g.group_blocks, div_up(g.group_blocks * block_bytes, kTapBytes));
  u_floats = g.storage == Storage::kTaps ? chunk_blocks * block_bytes / 4 : 0;
}

}  // namespace parnet::cpu
