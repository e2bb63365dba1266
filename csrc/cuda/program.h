// A program: launches recorded by parnet_kernels/cuda/program.py, with addresses as (buffer, offset). Playing
// one means to put addresses into each launch's arguments and launch it. No torch, no CUDA: tests play
// programs without either.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

#include "kernels.h"

namespace parnet::cuda {

constexpr int kMaxArguments = 4096;  // bytes a kernel may take

enum LaunchFlags : int32_t {
  kDependent = 1,    // may start while the launch before it ends (sm_90 and newer)
  kCooperative = 2,  // all blocks must be resident together
  kPairs = 4,        // every two blocks are a cluster (sm_90 and newer)
};

// Followed by arguments, relocations and label, each padded to 8 bytes.
struct Record {
  int32_t kernel, grid, shared, flags;
  int32_t argument_bytes, relocations, label_bytes, record_bytes;
};

// The 8 bytes at `at` of the arguments become the address of byte `offset` of buffer `buffer`.
struct Relocation {
  int32_t at, buffer;
  int64_t offset;
};

struct Buffer {
  char* data;
  int64_t bytes;
};

struct Launch {
  int kernel;
  unsigned grid, shared;
  int flags;
  const void* arguments;
  int argument_bytes;
  std::string label;
};

inline const char* name_of(int kernel) {
  return kernel >= 0 && kernel < kKernels ? kKernelNames[kernel] : "no kernel";
}

// Calls launcher(launch) for each record; it returns null or the text of an error. Returns "" or what went
// wrong.
template <class Launcher>
std::string play(const uint8_t* program, int64_t size, const Buffer* buffers, int64_t count,
                 Launcher&& launcher) {
  const auto padded = [](int64_t n) { return (n + 7) / 8 * 8; };
  for (int64_t at = 0; at < size;) {
    Record record;
    if (size - at < static_cast<int64_t>(sizeof(record))) return "`program` is cut short";
    std::memcpy(&record, program + at, sizeof(record));
    const uint8_t* arguments = program + at + sizeof(record);
    const uint8_t* relocations = arguments + padded(record.argument_bytes);
    const int64_t bytes = sizeof(record) + padded(record.argument_bytes) +
                          static_cast<int64_t>(record.relocations) * sizeof(Relocation) +
                          padded(record.label_bytes);
    if (record.argument_bytes < 0 || record.argument_bytes > kMaxArguments || record.relocations < 0 ||
        record.label_bytes < 0 || record.record_bytes != bytes || size - at < bytes)
      return "`program` is malformed at byte " + std::to_string(at);
    alignas(16) uint8_t patched[kMaxArguments];
    std::memcpy(patched, arguments, record.argument_bytes);
    const char* label = reinterpret_cast<const char*>(relocations + record.relocations * sizeof(Relocation));
    const Launch launch{record.kernel,
                        static_cast<unsigned>(record.grid),
                        static_cast<unsigned>(record.shared),
                        record.flags,
                        patched,
                        record.argument_bytes,
                        std::string(label, record.label_bytes)};
    for (int i = 0; i < record.relocations; i++) {
      Relocation r;
      std::memcpy(&r, relocations + i * sizeof(r), sizeof(r));
      if (r.at < 0 || r.at + 8 > record.argument_bytes || r.buffer < 0 || r.buffer >= count || r.offset < 0 ||
          r.offset > buffers[r.buffer].bytes)
        return launch.label + ": address " + std::to_string(i) + " is outside its buffer (" +
               std::to_string(r.buffer) + ", byte " + std::to_string(r.offset) + ")";
      char* address = buffers[r.buffer].data + r.offset;
      std::memcpy(patched + r.at, &address, 8);
    }
    if (const char* error = launcher(launch))
      return launch.label + ": " + name_of(launch.kernel) + ", " + std::to_string(launch.grid) + " blocks, " +
             std::to_string(launch.shared) + " bytes of shared memory, failed: " + error;
    at += bytes;
  }
  return "";
}

}  // namespace parnet::cuda
