// The names, sizes and offsets of all that parnet_kernels/cuda/program.py mirrors: the library tells them, so
// that Python code refuses one that it was not written for.
#pragma once
#include <cstddef>
#include <string>

#include "layer.h"
#include "program.h"

namespace parnet::cuda {

// To be raised, with FORMAT of program.py, when a field, or a byte of a packed tensor, gets another meaning
// but neither another name nor another place.
constexpr int kFormat = 1;

// A line for each struct, "name bytes", for each of its fields, "name.field offset", and for each constant,
// "name value".
inline std::string layout() {
  std::string lines;
  const auto add = [&](const char* name, int64_t value) {
    lines += std::string(name) + ' ' + std::to_string(value) + '\n';
  };
#define PARNET_FIELD(STRUCT, NAME) add(#STRUCT "." #NAME, offsetof(STRUCT, NAME))
#define PARNET_STRUCT(STRUCT) add(#STRUCT, sizeof(STRUCT))
#define PARNET_CONSTANT(NAME) add(#NAME, NAME)
  PARNET_STRUCT(Record);
  PARNET_FIELD(Record, kernel), PARNET_FIELD(Record, grid), PARNET_FIELD(Record, shared);
  PARNET_FIELD(Record, flags), PARNET_FIELD(Record, argument_bytes), PARNET_FIELD(Record, relocations);
  PARNET_FIELD(Record, label_bytes), PARNET_FIELD(Record, record_bytes);

  PARNET_STRUCT(Relocation);
  PARNET_FIELD(Relocation, at), PARNET_FIELD(Relocation, buffer), PARNET_FIELD(Relocation, offset);

  PARNET_STRUCT(Output);
  PARNET_FIELD(Output, y), PARNET_FIELD(Output, sums), PARNET_FIELD(Output, vectors);
  PARNET_FIELD(Output, pitch), PARNET_FIELD(Output, width);
  PARNET_FIELD(Output, group_step), PARNET_FIELD(Output, channel_step);
  PARNET_FIELD(Output, out_h), PARNET_FIELD(Output, out_w);
  PARNET_FIELD(Output, tiles_down), PARNET_FIELD(Output, tiles_across);
  PARNET_FIELD(Output, flags), PARNET_FIELD(Output, inverse_area);

  PARNET_STRUCT(Input);
  PARNET_FIELD(Input, x), PARNET_FIELD(Input, sums), PARNET_FIELD(Input, pitch),
      PARNET_FIELD(Input, sum_tiles);

  PARNET_STRUCT(LayerCall);
  PARNET_FIELD(LayerCall, inputs), PARNET_FIELD(LayerCall, out);
  PARNET_FIELD(LayerCall, weight), PARNET_FIELD(LayerCall, gate_weight), PARNET_FIELD(LayerCall, chunk_table);
  PARNET_FIELD(LayerCall, chunk_masks);
  PARNET_FIELD(LayerCall, partial), PARNET_FIELD(LayerCall, partial_logits),
      PARNET_FIELD(LayerCall, arrivals);
  PARNET_FIELD(LayerCall, first_block), PARNET_FIELD(LayerCall, blocks);
  PARNET_FIELD(LayerCall, tile), PARNET_FIELD(LayerCall, pairing);
  PARNET_FIELD(LayerCall, h), PARNET_FIELD(LayerCall, w), PARNET_FIELD(LayerCall, stride);
  PARNET_FIELD(LayerCall, groups), PARNET_FIELD(LayerCall, column_tiles), PARNET_FIELD(LayerCall, chunks);
  PARNET_FIELD(LayerCall, splits), PARNET_FIELD(LayerCall, tile_rows), PARNET_FIELD(LayerCall, tile_cols);
  PARNET_FIELD(LayerCall, cells), PARNET_FIELD(LayerCall, cell_pitch), PARNET_FIELD(LayerCall, images);

  PARNET_STRUCT(LevelCall);
  PARNET_FIELD(LevelCall, layers), PARNET_FIELD(LevelCall, reserved), PARNET_FIELD(LevelCall, layer);

  PARNET_STRUCT(Strided);
  PARNET_FIELD(Strided, data), PARNET_FIELD(Strided, stride);
  PARNET_FIELD(Strided, n), PARNET_FIELD(Strided, c), PARNET_FIELD(Strided, h), PARNET_FIELD(Strided, w);

  PARNET_STRUCT(StemCall);
  PARNET_FIELD(StemCall, image), PARNET_FIELD(StemCall, out), PARNET_FIELD(StemCall, weight);
  PARNET_FIELD(StemCall, gate_weight), PARNET_FIELD(StemCall, image_sums), PARNET_FIELD(StemCall, barrier);
  PARNET_FIELD(StemCall, stride), PARNET_FIELD(StemCall, column_tiles), PARNET_FIELD(StemCall, chunks);
  PARNET_FIELD(StemCall, reserved);

  PARNET_STRUCT(EnterCall);
  PARNET_FIELD(EnterCall, input), PARNET_FIELD(EnterCall, out), PARNET_FIELD(EnterCall, sums);
  PARNET_FIELD(EnterCall, pitch), PARNET_FIELD(EnterCall, tiles);
  PARNET_FIELD(EnterCall, round), PARNET_FIELD(EnterCall, reserved);

  PARNET_STRUCT(ClassifierCall);
  PARNET_FIELD(ClassifierCall, sums), PARNET_FIELD(ClassifierCall, weight),
      PARNET_FIELD(ClassifierCall, bias);
  PARNET_FIELD(ClassifierCall, y), PARNET_FIELD(ClassifierCall, n), PARNET_FIELD(ClassifierCall, sum_tiles);
  PARNET_FIELD(ClassifierCall, pitch), PARNET_FIELD(ClassifierCall, features);
  PARNET_FIELD(ClassifierCall, classes), PARNET_FIELD(ClassifierCall, inverse_area);

  PARNET_CONSTANT(kFormat), PARNET_CONSTANT(kMaxLayers);
  PARNET_CONSTANT(kDependent), PARNET_CONSTANT(kCooperative), PARNET_CONSTANT(kPairs);
  PARNET_CONSTANT(kSkip), PARNET_CONSTANT(kReLU), PARNET_CONSTANT(kVectorStore), PARNET_CONSTANT(kRound);
  PARNET_CONSTANT(kAlone), PARNET_CONSTANT(kPixels), PARNET_CONSTANT(kSplits);
#undef PARNET_FIELD
#undef PARNET_STRUCT
#undef PARNET_CONSTANT
  return lines;
}

}  // namespace parnet::cuda
