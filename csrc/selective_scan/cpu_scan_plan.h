// Which lanes a block of the scan kernels has, how their work is cut into items, and where sequences lie.
#pragma once
#include "common/parallel.h"
#include "selective_scan/cpu_scan_state.h"
#include "selective_scan/scan.h"

namespace {

using scalekern::ScanArgs;
using scalekern::ScanTensor;

// --- blocks and the split of work ---

struct Block {
  int64_t channel;  // the first one
  int channels;     // W or fewer with channels as lanes, 1 with states as lanes
};

// Work is cut into items (b, group, part of the group's blocks, segment of time).
constexpr int64_t kMaxBundle = 32;  // blocks that one item takes through time together

struct Plan {
  bool state_lanes;
  int64_t vectors;   // of a state
  int64_t groups;    // of channels that share both B and C, or that a cut of both respects
  int64_t blocks;    // of a group
  int64_t parts, segments, chunks, bundle;
  int64_t span;      // times of a tile of inputs

  int64_t items(const ScanArgs& a) const { return a.batch * groups * parts * segments; }
};

struct Item {
  int64_t b, group, part, segment;
  int64_t begin, end;  // times
};

static inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// The block that starts at channel c: no group boundary of B or C inside it.
template <class F>
static Block block_at(const ScanArgs& a, const Plan& plan, int64_t c) {
  int64_t end = least(c + (plan.state_lanes ? 1 : kLanes<F>), a.channels);
  const int64_t size_B = a.channels / most(1, a.groups_B), size_C = a.channels / most(1, a.groups_C);
  end = least(end, least((c / size_B + 1) * size_B, (c / size_C + 1) * size_C));
  return {c, int(end - c)};
}

static inline Item item_at(const ScanArgs& a, const Plan& plan, int64_t index) {
  Item i;
  i.segment = index % plan.segments, index /= plan.segments;
  i.part = index % plan.parts, index /= plan.parts;
  i.group = index % plan.groups, i.b = index / plan.groups;
  const int64_t first = plan.chunks * i.segment / plan.segments, last = plan.chunks * (i.segment + 1) / plan.segments;
  i.begin = most(0, first * a.chunk - a.pad), i.end = least(a.length, last * a.chunk - a.pad);
  return i;
}

// Calls body(block) for the blocks of an item's part.
template <class F, class Body>
static void for_blocks(const ScanArgs& a, const Plan& plan, const Item& item, const Body& body) {
  const int64_t size = a.channels / plan.groups, first = plan.blocks * item.part / plan.parts;
  const int64_t last = plan.blocks * (item.part + 1) / plan.parts;
  int64_t c = item.group * size;
  for (int64_t i = 0; i < last; ++i) {
    const Block block = block_at<F>(a, plan, c);
    if (i >= first) body(block);
    c += block.channels;
  }
}

// `max_parts` bounds the parts of a group (the backward pays memory for each).
template <class F>
static Plan make_plan(const ScanArgs& a, int64_t max_parts) {
  constexpr int W = kLanes<F>;
  Plan p{};
  p.chunks = ceil_div(a.length, a.chunk);
  p.groups = most(1, gcd(a.groups_B, a.groups_C));
  const auto count_blocks = [&] {
    int64_t count = 0;
    for (int64_t c = 0; c < a.channels / p.groups; ++count) c += block_at<F>(a, p, c).channels;
    return count;
  };
  // A vector costs about half as much again with states as lanes: B and C are transposed, y is summed across.
  p.blocks = count_blocks();
  const int64_t by_channel = p.blocks * p.groups * a.states, by_state = a.channels * ceil_div(a.states, W);
  p.state_lanes = 3 * by_state < 2 * by_channel;
  if (p.state_lanes) p.blocks = count_blocks();
  p.vectors = p.state_lanes ? ceil_div(a.states, W) : a.states;
  const int64_t threads = scalekern::num_threads(), whole = a.batch * p.groups;
  p.parts = threads == 1 ? 1 : most(1, least(least(p.blocks, max_parts), ceil_div(4 * threads, whole)));
  // Time is cut when the threads would be idle otherwise, into segments of at least 1024 tokens.
  p.segments = 1;
  const auto efficiency = [&](int64_t segments) {
    const int64_t items = whole * p.parts * segments;
    return double(items) / double(threads * ceil_div(items, threads));
  };
  const int64_t max_segments = least(4 * threads, p.chunks * a.chunk / most(1024, 2 * a.chunk));
  for (int64_t s = 2; s <= max_segments && efficiency(p.segments) < 0.8; ++s)
    if (efficiency(s) > efficiency(p.segments)) p.segments = s;
  // With channels contiguous, whole rows of many channels go through a tile together. With time contiguous, each of
  // W channels times seven tensors lies in a page of its own: a few of them stream, 1 KiB at a time. (At L = 2^20,
  // where the pages also fall into one set of the TLB, 256 B at a time made the backward 1.6 times slower.)
  // So do the columns of an image whose rows are contiguous: a cache line holds pixels of 16 of them.
  const bool rows = a.u.s[2] != 1 && a.u.s[2] != -1, crossed = a.u.line < a.length && a.u.s[1] != 1;
  p.bundle = rows && !crossed ? kMaxBundle : 2;
  p.span = rows || a.length <= 64 ? 64 : 256;
  return p;
}

// --- sequences ---

// The sequence that time t belongs to (never an empty one).
static inline int64_t sequence_at(const ScanArgs& a, int64_t t) {
  int64_t low = 0, high = a.sequences;  // starts[low] <= t < starts[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.starts[middle] <= t ? low : high) = middle;
  }
  return low;
}

}  // namespace
