// How one layer's output is cut into tiles, and which tiles are multiplied together as a set. Tiles depend on
// shapes and storage only, sets on the number of threads as well; results never depend on the sets.
#pragma once
#include <memory>
#include <vector>

#include "../layer.h"

namespace parnet::cpu {

// The geometry of a packed layer: what planning needs of a header, and what makes two plans equal.
struct Geometry {
  Kind kind;
  Storage storage;
  int32_t stride, groups, in_channels, out_channels, in_blocks, out_blocks, group_blocks, panels;
  bool operator==(const Geometry&) const = default;
};
Geometry geometry_of(const PackedHeader&);

struct TilePlan {
  std::vector<Tile> tiles;
  std::vector<TileSet> sets;
  int64_t v_floats;                    // transformed inputs of the largest set
  int64_t m_floats;                    // products of the panels that are multiplied at once
  int64_t u_floats;                    // weights made at the call, of a chunk of input channels
  int32_t chunk_blocks, sum_channels;  // see ConvArgs
  int32_t tiles_per_image;
  int threads;  // that it was made for

  TilePlan(const Geometry&, const Kernels&, int64_t images, int out_rows, int out_cols, int threads);
  TilePlan(const TilePlan&) = delete;

 private:
  struct Table {
    std::vector<int32_t> v_offset, v_step, m_offset;
    std::vector<MatrixUse> uses;
    TileTable view;
  };
  std::vector<std::unique_ptr<Table>> tables_;

  const TileTable* table_of(const Geometry&, const Kernels&, const Tile* tiles, int count);
};

}  // namespace parnet::cpu
