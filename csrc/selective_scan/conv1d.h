// Arguments of the short causal convolution, shared by the ops and their per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// Shape letters: B rows, D channels, L tokens, W filter width, S slots of states. Strides in elements.
struct ConvTensor {
  void* data;          // nullptr where an optional tensor is absent
  int64_t b, d, t;     // strides of the row or slot, the channel, the token
};

// Tokens [begin, end) of a row that are convolved by themselves: a row, a packed sequence, a run of one seq_idx.
struct ConvRun {
  int64_t row, begin, end;
  int64_t initial, final;  // slots of its initial and final state, or -1
  bool padding;            // output and gradient are zero
};

// A tile of a run. Runs are cut from their begin on, so every piece but a run's last has exactly `tile` tokens.
struct ConvPiece {
  int64_t run, begin, end;
};

constexpr int kConvMaxWidth = 8;
constexpr int64_t kConvTimeTile = 256;   // tokens of a tile whose lanes lie along time (one channel)
constexpr int64_t kConvBlock = 64;        // channels and ...
constexpr int64_t kConvBlockTile = 64;    // ... tokens of a tile whose lanes lie along channels: 16 KiB of float
constexpr int64_t kConvGroup = 1024;      // tokens of a unit of parallel work, whatever the number of threads ...
constexpr int64_t kConvLine = 4096;       // ... and of a forward one, and its tile, that goes from memory to memory

struct ConvArgs {
  int64_t channels, width;
  int dtype;               // of x, enum Dtype; parameters are float, or double when x is
  bool silu, along_time, parallel;
  const ConvRun* runs;
  const ConvPiece* pieces;
  const int64_t* groups;   // pieces of group g: [groups[g], groups[g + 1])
  int64_t run_count, group_count;
  ConvTensor x, initial, weight, bias;             // weight: d and t strides; bias: d
  ConvTensor out, final;                           // forward
  ConvTensor dout, dfinal, dx, dinitial, dweight, dbias;  // backward
  void* partials;          // (groups, D, W + 1) parameter gradients of each group
};

struct ConvUpdateArgs {
  int64_t batch, channels, steps, width, window;   // window: tokens that a slot of the state holds
  int dtype, state_dtype;
  bool silu, slots_are_int64, seen_are_int64;
  bool awake;                                      // the other threads have just worked: waking them costs little
  ConvTensor x, out, state, weight, bias;
  const void *slots, *seen;                        // conv_state_indices and cache_seqlens, (B,), or nullptr
  int64_t slots_b, seen_b;
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, conv1d_fwd, (const scalekern::ConvArgs&))
SCALEKERN_DECLARE(void, conv1d_bwd, (const scalekern::ConvArgs&))
SCALEKERN_DECLARE(void, conv1d_update, (const scalekern::ConvUpdateArgs&))
