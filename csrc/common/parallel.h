// Threads for kernels that include no torch: torch's own pool, so torch.set_num_threads holds.
#pragma once
#include <cstdint>

namespace scalekern {

int64_t num_threads();

// Runs body(begin, end, context) over [0, count) in contiguous pieces, at most one a thread.
void parallel_for(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// The same for a lambda:  parallel(count, [&](int64_t begin, int64_t end) { ... });
template <class F>
static inline void parallel(int64_t count, const F& body) {
  parallel_for(
      count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace scalekern
