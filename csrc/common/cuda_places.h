// How many blocks of a kernel a GPU holds at a time, for those that share out their work by it: an A100 has shared
// memory for fewer than an H100.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include "common/cuda_launch.h"
#endif

namespace scalekern {

template <class Kernel, class Exec>
int64_t places(const Exec& exec, [[maybe_unused]] int64_t shared_bytes) {
  int blocks = Kernel::kBlocks;
#if defined(__CUDACC__)
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_entry<Kernel>, Kernel::kThreads,
                                                      size_t(shared_bytes)),
        "occupancy");
#endif
  return int64_t(exec.processors()) * (blocks > 0 ? blocks : 1);
}

}  // namespace scalekern
