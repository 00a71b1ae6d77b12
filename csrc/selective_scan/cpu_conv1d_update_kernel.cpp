// The short causal convolution for the next tokens of a stream, in place on its state.
//
// Bound: at decoding sizes the call itself; one pass over the state's last W - 1 tokens, x and out.
// Layout: lanes along channels, whatever the strides, in tiles of kConvBlock channels and the W - 1 tokens before
//   them in L1; the state is moved on only after the last output, so its slot is read before it is written.
// Split: (row, block of channels) over threads, where that pays.
#include "selective_scan/conv1d.h"
#include "selective_scan/cpu_conv1d_line.h"

namespace {

using scalekern::ConvTensor;
using scalekern::ConvUpdateArgs;
using scalekern::kConvBlock;

constexpr int64_t kTokens = 32;  // of a tile
// An element costs about 3 ns, waking the other threads 5 to 20 us.
constexpr int64_t kParallelElements = 16384, kParallelAwake = 1024;

int64_t integer(const void* base, int64_t offset, bool wide) {
  return wide ? *at<int64_t>(base, offset) : *at<int32_t>(base, offset);
}

// Token i of a slot, oldest first, lies at (i + turn) % window. turn is 0 unless the state is circular.
struct Ring {
  int64_t window, turn;
  int64_t operator()(int64_t i) const { return (i + turn) % window; }
};

Ring ring_of(const ConvUpdateArgs& a, int64_t b) {
  if (a.seen == nullptr) return {a.window, 0};
  const int64_t turn = integer(a.seen, b * a.seen_b, a.seen_are_int64) % a.window;
  return {a.window, turn < 0 ? turn + a.window : turn};
}

// The last tokens of x enter the state: a circular one in their places, a window after moving the rest down.
template <class T, class S>
void move_on(const ConvUpdateArgs& a, const Ring& ring, S* state, const T* x, int64_t channels) {
  const int64_t kept = a.steps < a.window ? a.window - a.steps : 0;
  if (a.seen == nullptr && kept && a.state.t == 1 && a.state.d == a.window) {
    // All slots at once: what a slot's end gets from its neighbour is overwritten below.
    __builtin_memmove(state, state + a.steps, size_t(channels * a.window - a.steps) * sizeof(S));
  } else if (a.seen == nullptr) {
    for (int64_t i = 0; i < kept; ++i)
      for (int64_t c = 0; c < channels; ++c)
        state[c * a.state.d + i * a.state.t] = state[c * a.state.d + (i + a.steps) * a.state.t];
  }
  for (int64_t i = kept; i < a.window; ++i) {
    const int64_t token = i + a.steps - a.window, place = a.seen ? ring(token) : i;
    for (int64_t c = 0; c < channels; ++c)
      from_float(state[c * a.state.d + place * a.state.t], to_float(x[c * a.x.d + token * a.x.t]));
  }
}

template <class T, class S, class F = Compute<T>>
void update(const ConvUpdateArgs& a, ForwardLine<F> line, int64_t b, int64_t first, int64_t channels) {
  alignas(64) F filter[(kConvMaxWidth + 1) * kConvBlock], tile[(kTokens + kConvMaxWidth - 1) * kConvBlock];
  alignas(64) F y[kTokens * kConvBlock];
  T* out = at<T>(a.out.data, b * a.out.b + first * a.out.d);
  const int64_t slot = a.slots ? integer(a.slots, b * a.slots_b, a.slots_are_int64) : b;
  if (slot < 0) {  // padding
    zero(y, kConvBlock);
    for (int64_t t = 0; t < a.steps; ++t) narrow(out + t * a.out.t, a.out.d, y, channels);
    return;
  }
  const T* x = at<T>(a.x.data, b * a.x.b + first * a.x.d);
  S* state = at<S>(a.state.data, slot * a.state.b + first * a.state.d);
  const Ring ring = ring_of(a, b);
  const int64_t history = a.width - 1;
  for (int64_t k = 0; k < a.width; ++k)
    widen(filter + k * kConvBlock, at<F>(a.weight.data, first * a.weight.d + k * a.weight.t), a.weight.d, channels);
  zero(filter + a.width * kConvBlock, channels);
  if (a.bias.data) widen(filter + a.width * kConvBlock, at<F>(a.bias.data, first * a.bias.d), a.bias.d, channels);
  for (int64_t k = 0; k < history; ++k)
    widen(tile + k * kConvBlock, state + ring(a.window - history + k) * a.state.t, a.state.d, channels);
  for (int64_t begin = 0; begin < a.steps; begin += kTokens) {
    const int64_t tokens = a.steps - begin < kTokens ? a.steps - begin : kTokens;
    for (int64_t t = 0; t < tokens; ++t)
      widen(tile + (history + t) * kConvBlock, x + (begin + t) * a.x.t, a.x.d, channels);
    for (int64_t c = 0; c < channels; c += kLanes<F>)
      line(tile + c, y + c, kConvBlock, kConvBlock, kConvBlock, tokens, filter + c, kConvBlock);
    for (int64_t t = 0; t < tokens; ++t) narrow(out + (begin + t) * a.out.t, a.out.d, y + t * kConvBlock, channels);
    __builtin_memmove(tile, tile + tokens * kConvBlock, size_t(history * kConvBlock) * sizeof(F));
  }
  move_on(a, ring, state, x, channels);
}

template <class T, class S>
void run(const ConvUpdateArgs& a) {
  const int64_t blocks = (a.channels + kConvBlock - 1) / kConvBlock;
  const auto line = forward_line_for<Compute<T>>(a.width, a.silu);
  const bool worth_it = a.batch * a.channels * a.steps >= (a.awake ? kParallelAwake : kParallelElements);
  parallel_if(worth_it, a.batch * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kConvBlock, left = a.channels - first;
      update<T, S>(a, line, i / blocks, first, left < kConvBlock ? left : kConvBlock);
    }
  });
}

template <class T>
void with_state(const ConvUpdateArgs& a) {
  switch (a.state_dtype) {  // the order of enum Dtype
    case 0: return run<T, float>(a);
    case 1: return run<T, double>(a);
    case 2: return run<T, f16>(a);
    case 3: return run<T, bf16>(a);
  }
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void conv1d_update(const ConvUpdateArgs& a) {
  switch (a.dtype) {
    case 0: return with_state<float>(a);
    case 1: return with_state<double>(a);
    case 2: return with_state<f16>(a);
    case 3: return with_state<bf16>(a);
  }
}

}  // namespace scalekern::SCALEKERN_ISA
