// One decoding step of the selective scan.
//
// Bound: memory. The state is read and written once (8 N bytes a channel in fp32); A comes once for kBatch rows of the
// batch, everything else is smaller by N. Below some 32 MB of state the launch.
//
// Split: a thread owns 4 neighbouring states (16 bytes in fp32) of one (head, channel) for kBatch rows of the batch,
// whose loads are all under way before the first is used; N / 4 lanes a channel (4 to 32; beyond 128 states they loop).
// States of neighbouring channels are neighbours in memory, so a warp reads 512 bytes in a row. What a row of a channel
// needs once (dt with its softplus, x, z, D, the output) is one lane's work: lane i does it for row i % 4 and hands dt
// and x to the others by shuffle; the sums over N are exchanged so that lane i ends with row i % 4's.
//
// Measured on an H200 (bf16, fp32 state, B 256, D 8192, N 16): 88 us, 77 % of the copy bandwidth; Triton's is at 83.
//
// Lost, measured on an H200 (bf16, fp32 state, B 256, D 8192, N 16): every lane with its own softplus for every row,
// the state's type looked up at its loads and stores, and five divisions of 64 bits for a thread's place: 269 us, 358
// instructions a row and quad of states, 114 registers; memory does it in 68 us.
#pragma once
#include "common/cuda_block.cuh"
#include "common/view.h"
#include "selective_scan/state_update.h"

namespace scalekern::update {

using namespace scalekern::device;

struct Args {
  StateUpdateArgs u;
  int lane_bits, rows;  // threads of a channel; heads * dim
  bool A_packed;        // quads of A are contiguous and aligned
  Divisor by_row_blocks, by_dim, by_heads_per_group;
  int row_blocks;
};

// Four elements of a row, raw; beyond `count` zeros.
template <bool kPacked, class T>
SK_DEVICE Group<T, 4> load_four(const T* p, int64_t stride, int count) {
  if constexpr (kPacked) return Group<T, 4>::load(p);
  Group<T, 4> four{};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) four.set(i, p[i * stride]);
  return four;
}

template <bool kPacked, class T>
SK_DEVICE void store_four(T* p, int64_t stride, int count, const Compute<T> (&x)[4]) {
  const auto four = Group<T, 4>::of(x);
  if constexpr (kPacked) return four.store(p);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) p[i * stride] = four.get(i);
}

// T: inputs and output, S: the state. kPacked: the state, B and C are quads that are contiguous and aligned.
template <class T, class S, bool kPacked>
struct StateUpdate {
  using F = Compute<T>;
  using Args = update::Args;
  static constexpr int kThreads = 128, kBlocks = kPacked ? 5 : 1;
  static constexpr int kBatch = 4;

  template <class X>
  static SK_DEVICE const X* at(const void* base, int64_t offset) {
    return static_cast<const X*>(base) + offset;
  }

  static SK_DEVICE int64_t slot_of(const StateUpdateArgs& u, int64_t b) {
    if (u.indices == nullptr) return b;
    return Indices{u.indices, u.indices_b, u.indices_are_int64 != 0}[b];
  }

  // Sums over the lanes of a channel: lane i gets y[i % kBatch] in y[0].
  static SK_DEVICE F sum_lanes(F (&y)[kBatch], int lane, int lanes) {
    const bool odd = lane & 1, upper = lane & 2;
    const F a = (odd ? y[1] : y[0]) + shuffle_xor(odd ? y[0] : y[1], 1);
    const F b = (odd ? y[3] : y[2]) + shuffle_xor(odd ? y[2] : y[3], 1);
    F sum = (upper ? b : a) + shuffle_xor(upper ? a : b, 2);
    for (int m = 4; m < lanes; m *= 2) sum += shuffle_xor(sum, m);
    return sum;
  }

  static SK_DEVICE void run(const Args& a) {
    const StateUpdateArgs& u = a.u;
    const int lanes = 1 << a.lane_bits, lane = thread_index() & (lanes - 1);
    const int group = a.by_row_blocks.quotient(int(block_index()));
    const int row = (int(block_index()) - group * a.row_blocks) * (kThreads >> a.lane_bits) +
                    (thread_index() >> a.lane_bits);
    const bool active = row < a.rows;
    const int h = active ? a.by_dim.quotient(row) : 0, p = active ? row - h * int(u.dim) : 0;
    const int g = a.by_heads_per_group.quotient(h);

    // This lane's row of the batch, with what it needs once. Rows past the batch read its last one and store nothing.
    const int64_t begin = int64_t(group) * kBatch, own = begin + lane % kBatch;
    const int64_t b = own < u.batch ? own : u.batch - 1;
    const int slot = active && own < u.batch ? int(slot_of(u, b)) : -1;
    const T raw_x = *at<T>(u.x, b * u.x_b + h * u.x_h + p * u.x_p);
    const T raw_dt = *at<T>(u.dt, b * u.dt_b + h * u.dt_h + p * u.dt_p);
    const T raw_z = u.z ? *at<T>(u.z, b * u.z_b + h * u.z_h + p * u.z_p) : T{};
    const F bias = u.dt_bias ? *at<F>(u.dt_bias, h * u.bias_h + p * u.bias_p) : F(0);
    const F skip = u.D ? *at<F>(u.D, h * u.D_h + p * u.D_p) : F(0);

    const int first = thread_index() & 31 & ~(lanes - 1);  // the channel's first lane in the warp
    S* state = pinned(static_cast<S*>(u.state) + h * u.state_h + p * u.state_p);
    const F* A_row = pinned(at<F>(u.A, h * u.A_h + p * u.A_p));
    const T* B_row = pinned(at<T>(u.B, begin * u.B_b + g * u.B_g));
    const T* C_row = pinned(at<T>(u.C, begin * u.C_b + g * u.C_g));
    // Packed, a lane has all of its states at once, or none: lane 0's stand in, and are not stored.
    const bool idle = kPacked && 4 * lane >= u.states;
    S* states[kBatch];
    bool stored[kBatch];
    Group<S, 4> old[kBatch];
    Group<T, 4> B[kBatch], C[kBatch];
    Group<F, 4> A;
    const auto load = [&](int64_t n, int count) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int of_row = shuffle(slot, first + i);
        stored[i] = of_row >= 0 && !idle;
        states[i] = pinned(state + (of_row >= 0 ? of_row : 0) * u.state_s + n * u.state_n);
        old[i] = load_four<kPacked>(states[i], u.state_n, stored[i] || kPacked ? count : 0);
      }
      A = kPacked && a.A_packed ? load_four<true>(A_row + n * u.A_n, u.A_n, count)
                     : load_four<false>(A_row + n * u.A_n, u.A_n, count);
      const T *B_first = B_row + n * u.B_n, *C_first = C_row + n * u.C_n;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        B[i] = load_four<kPacked>(B_first, u.B_n, count);
        C[i] = load_four<kPacked>(C_first, u.C_n, count);
        if (begin + i + 1 < u.batch) B_first += u.B_b, C_first += u.C_b;
      }
      loads_begin_above();
    };
    const auto step = [&](int count, const F (&d)[kBatch], const F (&dx)[kBatch], F (&y)[kBatch]) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        Compute<S> fresh[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const F next = fused(exp2_unit(d[i] * A.get(e)), F(widen(old[i].get(e))), dx[i] * F(widen(B[i].get(e))));
          if (kPacked || e < count) y[i] = fused(F(widen(C[i].get(e))), next, y[i]);
          fresh[e] = Compute<S>(next);
        }
        if (stored[i]) store_four<kPacked>(states[i], u.state_n, count, fresh);
      }
    };
    if constexpr (kPacked) load(idle ? 0 : 4 * lane, 4);

    const F x = widen(raw_x);
    F dt = widen(raw_dt) + bias;
    if (u.softplus) dt = softplus(dt);
    F d[kBatch], dx[kBatch], y[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      d[i] = shuffle(dt * F(1.4426950408889634074), first + i);
      dx[i] = shuffle(dt * x, first + i);
    }
    if constexpr (kPacked) {
      step(4, d, dx, y);
      if (idle) y[0] = y[1] = y[2] = y[3] = 0;
    } else {
      for (int64_t begin_n = 0; begin_n < u.states; begin_n += 4 * lanes) {  // all lanes: they shuffle
        const int64_t n = begin_n + 4 * lane, left = u.states - n;
        const int count = left >= 4 ? 4 : left > 0 ? int(left) : 0;
        load(n, count);
        step(count, d, dx, y);
      }
    }
    const F sum = sum_lanes(y, lane, lanes);
    if (!active || lane >= kBatch || own >= u.batch) return;
    F out = sum + skip * x;
    if (u.z) out *= silu(F(widen(raw_z)));
    static_cast<T*>(u.out)[b * a.rows + row] = narrow<T>(slot < 0 ? F(0) : out);
  }
};

// Whether quads along the last axis are contiguous and aligned, wherever the other strides lead.
inline bool packed(const View& v, int bytes) {
  const int last = v.dims - 1, quad = 4 * bytes < 16 ? 4 * bytes : 16;
  bool ok = v.stride[last] == 1 && reinterpret_cast<uintptr_t>(v.data) % quad == 0;
  for (int i = 0; i < last; ++i) ok = ok && v.stride[i] * bytes % quad == 0;
  return ok;
}

template <class Exec>
void selective_state_update(
    Exec& exec, const View& out, const View& state, const View& x, const View& dt, const View& A, const View& B,
    const View& C, const View& D, const View& z, const View& dt_bias, const View& indices, bool softplus) {
  Args a{};
  StateUpdateArgs& u = a.u;
  u.batch = x.size[0], u.heads = x.size[1], u.dim = x.size[2], u.states = A.size[2];
  u.heads_per_group = u.heads / B.size[1];
  u.io_dtype = x.dtype, u.state_dtype = state.dtype, u.indices_are_int64 = indices.dtype == 5, u.softplus = softplus;
  u.state = state.data, u.out = out.data, u.x = x.data, u.dt = dt.data, u.A = A.data, u.B = B.data, u.C = C.data;
  u.D = D.data, u.z = z.data, u.dt_bias = dt_bias.data, u.indices = indices.data;
  u.state_s = state.stride[0], u.state_h = state.stride[1], u.state_p = state.stride[2], u.state_n = state.stride[3];
  u.x_b = x.stride[0], u.x_h = x.stride[1], u.x_p = x.stride[2];
  u.dt_b = dt.stride[0], u.dt_h = dt.stride[1], u.dt_p = dt.stride[2];
  u.z_b = z.stride[0], u.z_h = z.stride[1], u.z_p = z.stride[2];
  u.A_h = A.stride[0], u.A_p = A.stride[1], u.A_n = A.stride[2];
  u.B_b = B.stride[0], u.B_g = B.stride[1], u.B_n = B.stride[2];
  u.C_b = C.stride[0], u.C_g = C.stride[1], u.C_n = C.stride[2];
  u.D_h = D.stride[0], u.D_p = D.stride[1], u.bias_h = dt_bias.stride[0], u.bias_p = dt_bias.stride[1];
  u.indices_b = indices.stride[0];
  a.rows = int(u.heads * u.dim), a.by_dim = Divisor(u.dim), a.by_heads_per_group = Divisor(u.heads_per_group);
  while (a.lane_bits < 5 && (4 << a.lane_bits) < u.states) ++a.lane_bits;
  a.lane_bits = a.lane_bits < 2 ? 2 : a.lane_bits;
  with_type(u.io_dtype, [&]<class T>(T*) {
    with_type(u.state_dtype, [&]<class S>(S*) {
      const bool quads = u.states % 4 == 0;
      a.A_packed = quads && packed(A, sizeof(Compute<T>));
      const auto launch = [&]<bool kPacked>(std::bool_constant<kPacked>) {
        using Kernel = StateUpdate<T, S, kPacked>;
        a.row_blocks = int(ceil_div(a.rows, Kernel::kThreads >> a.lane_bits)), a.by_row_blocks = Divisor(a.row_blocks);
        exec.template launch<Kernel>(a.row_blocks * ceil_div(u.batch, Kernel::kBatch), 0, a);
      };
      if constexpr (sizeof(Compute<T>) == 4 && sizeof(S) <= 4) {
        const bool fits = quads && u.states <= 128 && state.size[0] > 0;
        if (fits && packed(state, sizeof(S)) && packed(B, sizeof(T)) && packed(C, sizeof(T)))
          return launch(std::true_type{});
      }
      launch(std::false_type{});
    });
  });
}

}  // namespace scalekern::update
