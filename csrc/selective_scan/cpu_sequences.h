// Packed sequences as the CPU kernels of recurrences read them.
#pragma once
#include <vector>

#include "common/tensor.h"

namespace scalekern {

// The sequences' first times in the order of the recurrence, and L; of a call that is not packed 0 and L.
inline std::vector<int64_t> sequence_starts(const OptionalTensor& cu_seqlens, int64_t length, bool backwards) {
  if (!cu_seqlens.has_value()) return {0, length};
  const int64_t count = cu_seqlens->size(0), step = stride(*cu_seqlens, 0);
  const bool wide = dtype_of(*cu_seqlens) == Dtype::i64;
  std::vector<int64_t> starts(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = wide ? static_cast<const int64_t*>(data(*cu_seqlens))[i * step]
                               : static_cast<const int32_t*>(data(*cu_seqlens))[i * step];
    starts[backwards ? count - 1 - i : i] = backwards ? length - value : value;
  }
  return starts;
}

}  // namespace scalekern
