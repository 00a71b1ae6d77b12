// Work that threads share out as they go.
#pragma once
#include "common/parallel.h"

namespace {

// thread(take) on each thread; take(body) calls body(begin, end) with ranges of [0, count), `share` at once or fewer:
// those of the thread's own stretch, of which its caches have some from the last call, and whose fresh pages no other
// thread clears, then what others have left of theirs. Cores of a shared machine are not equally fast: 5 to 25 % less
// time than one stretch each.
template <class Thread>
static inline void parallel_stretches(bool worth_it, int64_t count, int64_t share, const Thread& thread) {
  constexpr int64_t kMost = 64, kApart = 8;  // a cache line for each
  int64_t threads = worth_it ? scalekern::num_threads() : 1;
  threads = threads < kMost ? threads : kMost;
  threads = threads < (count + share - 1) / share ? threads : (count + share - 1) / share;
  int64_t taken[kMost * kApart] = {};
  const auto run = [&](int64_t first, int64_t last) {
    thread([&](const auto& body) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t i = 0; i < threads; ++i) {
          const int64_t own = (t + i) % threads, start = count * own / threads, stop = count * (own + 1) / threads;
          for (int64_t at; (at = start + __atomic_fetch_add(taken + own * kApart, share, __ATOMIC_RELAXED)) < stop;)
            body(at, at + share < stop ? at + share : stop);
        }
    });
  };
  if (threads > 1) scalekern::parallel(threads, run);
  else if (threads == 1) run(0, 1);
}

}  // namespace
