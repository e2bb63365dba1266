// What the bindings share: torch's threads, bytes that kernels read, hashes of their contents.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <optional>

#include "schedule/workspace.h"

namespace parnet::cpu {

using torch::stable::Tensor;

inline void parallel_items(int64_t count, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i);
  });
}

// Zeroed, in huge pages.
inline Tensor zeroed_bytes(int64_t bytes) {
  Tensor result = torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte);
  char* to = static_cast<char*>(result.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % 64 == 0, "the allocator must align to 64 bytes");
  advise_huge_pages(to, bytes);
  constexpr int64_t kChunk = 1 << 20;
  parallel_items((bytes + kChunk - 1) / kChunk,
                 [&](int64_t i) { std::fill_n(to + i * kChunk, std::min(kChunk, bytes - i * kChunk), 0); });
  return result;
}

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x100000001b3;
  return hash ^ hash >> 29;
}

template <class T>
inline uint64_t read_bits(const char* from) {
  T bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}

// A whole network on x: see _cpu_network in schemas.inc.
Tensor run_network(const Tensor& x, const Tensor& packed, const Tensor& steps, bool pooled,
                   bool channels_last, const std::optional<Tensor>& classifier);

}  // namespace parnet::cpu
