// One decoding step of the selective scan.
//
// Bound: memory. The state is read and written once (8 N bytes a channel in fp32); A comes once for kBatch rows of the
// batch, everything else is smaller by N. Below some 32 MB of state the launch.
//
// Split: a thread owns 4 neighbouring states (16 bytes in fp32) of one (head, channel) and walks over the batch, kBatch
// rows at a time; N / 4 lanes a channel (4 to 32; beyond 128 states they loop). States of neighbouring channels are
// neighbours in memory, so a warp reads 512 bytes in a row. What a row of a channel needs once (dt with its softplus,
// x, z, D, the output) is one lane's work: lane i does it for row i % 4 and hands dt and x to the others by shuffle; the
// sums over N are exchanged so that lane i ends with row i % 4's.
//
// The states of the next kStages - 1 groups of rows are on their way to shared memory while one is worked on: 147 KB an
// SM at 6 blocks (an A100 has room for 4), all the time, where 22 to 29 KB would keep the memory busy. No thread reads
// what another one copied, so there is no barrier. A, the bias and D stay in registers for all rows of a block.
//
// Predicted for an H200 (bf16, fp32 state, B 256, D 8192, N 16): 75 us, 89 % of the copy bandwidth: 286 MB at its full
// rate are 67 us, the launch and the first rows 4, the last blocks' end 3. Never measured.
//
// Lost, measured on an H200 (that case):
// - A block for each group of rows, which loads, computes, stores and ends: 88 us, 77 %. 20 warps with 2 KB each on
//   their way are 40 KB an SM, but only between a block's start and its first use. Triton's, with twice that but A read
//   anew for every row (134 MB more from the L2): 83 us.
// - Every lane with its own softplus for every row, the state's type looked up at its loads and stores, and five
//   divisions of 64 bits for a thread's place: 269 us, 358 instructions a row and quad of states, 114 registers.
#pragma once
#include "common/cuda_pipeline.cuh"
#include "common/cuda_places.h"
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
  int batch, groups, groups_of_block;  // rows; kBatch of them each
  int64_t slot_bytes;                  // from a state to the next row's
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
// kIndexed: rows of the batch have their states in slots (looked up where there are none, 140 instructions a group).
template <class T, class S, bool kPacked, bool kIndexed>
struct StateUpdate {
  using F = Compute<T>;
  using Args = update::Args;
  static constexpr int kThreads = 128, kBlocks = kPacked ? 6 : 1;
  static constexpr int kBatch = 4, kStages = 4, kStage = kBatch * kThreads;
  using Quad = Group<S, 4>;

  static int64_t shared_bytes(int groups) {
    return kPacked ? int64_t(groups < kStages ? groups : kStages) * kStage * sizeof(Quad) : 0;
  }

  template <class X>
  static SK_DEVICE const X* at(const void* base, int64_t offset) {
    return static_cast<const X*>(base) + offset;
  }

  // Where row b of the batch has its state; -1: nowhere.
  static SK_DEVICE int slot_of(const Args& a, int b) {
    if (b >= a.batch) return -1;
    if constexpr (kIndexed) return int(Indices{a.u.indices, a.u.indices_b, a.u.indices_are_int64 != 0}[b]);
    return b;
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
    const int span = a.by_row_blocks.quotient(int(block_index()));
    const int row = (int(block_index()) - span * a.row_blocks) * (kThreads >> a.lane_bits) +
                    (thread_index() >> a.lane_bits);
    const bool active = row < a.rows;
    const int h = active ? a.by_dim.quotient(row) : 0, p = active ? row - h * int(u.dim) : 0;
    const int g = a.by_heads_per_group.quotient(h);
    const F bias = u.dt_bias ? *at<F>(u.dt_bias, h * u.bias_h + p * u.bias_p) : F(0);
    const F skip = u.D ? *at<F>(u.D, h * u.D_h + p * u.D_p) : F(0);

    const int channel = thread_index() & 31 & ~(lanes - 1);  // its first lane in the warp
    // Packed, a lane has all of its states at once, or none: lane 0's stand in, and are not stored.
    const bool idle = kept(!active || (kPacked && 4 * lane >= u.states));
    const int64_t mine = idle || !kPacked ? 0 : 4 * lane;
    char* state = pinned(reinterpret_cast<char*>(
        static_cast<S*>(u.state) + h * u.state_h + p * u.state_p + mine * u.state_n));
    const auto state_of = [&](int slot) { return reinterpret_cast<S*>(state + uint32_t(slot) * a.slot_bytes); };
    const F* A_row = pinned(at<F>(u.A, h * u.A_h + p * u.A_p));
    const auto load_A = [&](int64_t n, int count) {
      return kPacked && a.A_packed ? load_four<true>(A_row + n * u.A_n, u.A_n, count)
                                   : load_four<false>(A_row + n * u.A_n, u.A_n, count);
    };
    Group<F, 4> A{};
    if constexpr (kPacked) A = load_A(mine, 4);

    const int begin = span * a.groups_of_block * kBatch;
    const int stop = begin + a.groups_of_block * kBatch, end = stop < a.batch ? stop : a.batch;
    // [kStages][kBatch][kThreads]; where this thread's quads of the group at hand begin.
    Quad* ring = reinterpret_cast<Quad*>(shared_memory()) + thread_index();
    unsigned stage = 0;
    const auto fetch = [&](int first, unsigned to) {
      if (first < end) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int slot = slot_of(a, first + i);
          const bool on = slot >= 0 && !idle;
          if constexpr (kPacked)
            copy_in_group<sizeof(Quad)>(ring + to + i * kThreads, state_of(on ? slot : 0), on);
        }
      }
      copy_group();
    };
    if constexpr (kPacked)
      for (int i = 0; i < kStages - 1; ++i) fetch(begin + i * kBatch, i * kStage);

    // What this lane's row of a group needs once, from where to where.
    const int64_t own_begin = begin + lane % kBatch;
    const T* x_own = at<T>(u.x, own_begin * u.x_b + h * u.x_h + p * u.x_p);
    const T* dt_own = at<T>(u.dt, own_begin * u.dt_b + h * u.dt_h + p * u.dt_p);
    const T* z_own = at<T>(u.z, own_begin * u.z_b + h * u.z_h + p * u.z_p);
    T* out_own = static_cast<T*>(u.out) + own_begin * a.rows + row;
    const T* B_group = pinned(at<T>(u.B, begin * u.B_b + g * u.B_g + mine * u.B_n));
    const T* C_group = pinned(at<T>(u.C, begin * u.C_b + g * u.C_g + mine * u.C_n));

    for (int first = begin; first < end; first += kBatch) {
      const bool there = first + lane % kBatch < end;
      const T raw_x = there ? *x_own : T{}, raw_dt = there ? *dt_own : T{};
      const T raw_z = there && u.z ? *z_own : T{};
      Group<T, 4> B[kBatch], C[kBatch];
      const auto load_BC = [&](int64_t n, int count) {
        const T *B_row = B_group + n * u.B_n, *C_row = C_group + n * u.C_n;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          B[i] = C[i] = Group<T, 4>{};
          if (first + i < end) {
            B[i] = load_four<kPacked>(B_row, u.B_n, count);
            C[i] = load_four<kPacked>(C_row, u.C_n, count);
          }
          B_row += u.B_b, C_row += u.C_b;
        }
      };
      if constexpr (kPacked) {
        load_BC(0, 4);
        loads_begin_above();
        fetch(first + (kStages - 1) * kBatch, (stage + (kStages - 1) * kStage) % (kStages * kStage));
      }

      const F x = widen(raw_x);
      F dt = widen(raw_dt) + bias;
      if (u.softplus) dt = softplus(dt);
      F d[kBatch], dx[kBatch], y[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        d[i] = shuffle(dt * F(1.4426950408889634074), channel + i);
        dx[i] = shuffle(dt * x, channel + i);
      }
      const auto step = [&](int i, S* at, const Quad& old, int count) {
        Compute<S> fresh[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const F next = fused(exp2_unit(d[i] * A.get(e)), F(widen(old.get(e))), dx[i] * F(widen(B[i].get(e))));
          if (kPacked || e < count) y[i] = fused(F(widen(C[i].get(e))), next, y[i]);
          fresh[e] = Compute<S>(next);
        }
        if (!idle) store_four<kPacked>(at, u.state_n, count, fresh);
      };
      const auto rows = [&](int64_t n, int count) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int slot = slot_of(a, first + i);
          if (slot < 0) continue;
          S* at = state_of(slot) + n * u.state_n;
          if constexpr (kPacked) step(i, at, ring[stage + i * kThreads], 4);
          else step(i, at, load_four<false>(at, u.state_n, count), count);
        }
      };
      if constexpr (kPacked) {
        copy_wait_but<kStages - 1>();
        rows(0, 4);
        if (idle) y[0] = y[1] = y[2] = y[3] = 0;
        stage = (stage + kStage) % (kStages * kStage);
      } else {
        for (int64_t begin_n = 0; begin_n < u.states; begin_n += 4 * lanes) {
          const int64_t n = begin_n + 4 * lane, left = u.states - n;
          const int count = left >= 4 ? 4 : left > 0 ? int(left) : 0;
          A = load_A(n, count);
          load_BC(n, count);
          rows(n, count);
        }
      }
      const F sum = sum_lanes(y, lane, lanes);
      if (active && lane < kBatch && there) {
        F out = sum + skip * x;
        if (u.z) out *= silu(F(widen(raw_z)));
        if (slot_of(a, first + lane) < 0) out = 0;
        *out_own = narrow<T>(out);
      }
      x_own += kBatch * u.x_b, dt_own += kBatch * u.dt_b, z_own += kBatch * u.z_b;
      out_own += int64_t(kBatch) * a.rows, B_group += kBatch * u.B_b, C_group += kBatch * u.C_b;
    }
  }
};

// Whether quads along the last axis are contiguous and aligned, wherever the other strides lead.
inline bool packed(const View& v, int bytes) {
  const int last = v.dims - 1, quad = 4 * bytes < 16 ? 4 * bytes : 16;
  bool ok = v.stride[last] == 1 && reinterpret_cast<uintptr_t>(v.data) % quad == 0;
  for (int i = 0; i < last; ++i) ok = ok && v.stride[i] * bytes % quad == 0;
  return ok;
}

// Groups of rows that a block walks over: the GPU's places are filled once, from half up, or else four times and more,
// so that the last blocks to end are few.
inline int groups_of_block(int64_t groups, int64_t row_blocks, int64_t places) {
  const int64_t fit = places / row_blocks, blocks = fit > 0 ? fit : ceil_div(4 * places, row_blocks);
  return int(ceil_div(groups, blocks < groups ? blocks : groups));
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
      const auto launch = [&]<bool kPacked, bool kIndexed>(std::bool_constant<kPacked>, std::bool_constant<kIndexed>) {
        using Kernel = StateUpdate<T, S, kPacked, kIndexed>;
        a.row_blocks = int(ceil_div(a.rows, Kernel::kThreads >> a.lane_bits)), a.by_row_blocks = Divisor(a.row_blocks);
        a.batch = int(u.batch), a.groups = int(ceil_div(u.batch, Kernel::kBatch));
        a.slot_bytes = u.state_s * int64_t(sizeof(S));
        const int64_t places = scalekern::places<Kernel>(exec, Kernel::shared_bytes(Kernel::kStages));
        a.groups_of_block = groups_of_block(a.groups, a.row_blocks, places);
        const int64_t blocks = a.row_blocks * ceil_div(a.groups, a.groups_of_block);
        exec.template launch<Kernel>(blocks, Kernel::shared_bytes(a.groups_of_block), a);
      };
      if constexpr (sizeof(Compute<T>) == 4 && sizeof(S) <= 4) {
        const bool fits = quads && u.states <= 128 && state.size[0] > 0;
        if (fits && packed(state, sizeof(S)) && packed(B, sizeof(T)) && packed(C, sizeof(T)))
          return u.indices ? launch(std::true_type{}, std::true_type{}) : launch(std::true_type{}, std::false_type{});
      }
      u.indices ? launch(std::false_type{}, std::true_type{}) : launch(std::false_type{}, std::false_type{});
    });
  });
}

}  // namespace scalekern::update
