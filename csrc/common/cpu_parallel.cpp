#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace scalekern {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace scalekern
