// One decoding step of the selective scan.
//
// Bound: memory. The state is read and written once (8 N bytes a channel in fp32); A comes once for kBatch rows of the
// batch, everything else is smaller by N. Predicted: 85 to 95 % of the copy bandwidth from about 32 MB of state on;
// below that the launch. Never measured on a GPU.
//
// Split: a thread owns 4 neighbouring states (16 bytes in fp32) of one (head, channel) for kBatch rows of the batch,
// whose loads are all under way before the first is used; N / 4 lanes a channel (at most 32, then they loop), which add
// y by shuffles. States of neighbouring channels are neighbours in memory, so a warp reads 512 bytes in a row.
#pragma once
#include "common/cuda_block.cuh"
#include "common/view.h"
#include "selective_scan/state_update.h"

namespace scalekern::update {

using namespace scalekern::device;

struct Args {
  StateUpdateArgs u;
  int lanes;
  bool state_packed, A_packed, B_packed, C_packed;  // quads of it are contiguous and aligned
  int64_t row_blocks;
};

template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T v[4];
};

// Up to four elements of a row, widened; beyond `count` zeros.
template <class T, class F>
SK_DEVICE void load_four(const T* p, int64_t stride, int count, bool packed, F (&x)[4]) {
  if (packed && count == 4) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = F(widen(four.v[i]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < count ? F(widen(p[i * stride])) : F(0);
  }
}

template <class T, class F>
SK_DEVICE void store_four(T* p, int64_t stride, int count, bool packed, const F (&x)[4]) {
  using Stored = Compute<T>;
  if (packed && count == 4) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.v[i] = narrow<T>(Stored(x[i]));
    *reinterpret_cast<Four<T>*>(p) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) p[i * stride] = narrow<T>(Stored(x[i]));
  }
}

// T: inputs and output. The state's type is decided at run time, by a uniform branch at its loads and at its stores.
template <class T>
struct StateUpdate {
  using F = Compute<T>;
  using Args = update::Args;
  static constexpr int kThreads = 128, kBlocks = sizeof(F) == 8 ? 1 : 4;
  static constexpr int kBatch = 4;

  template <class X>
  static SK_DEVICE const X* at(const void* base, int64_t offset) {
    return static_cast<const X*>(base) + offset;
  }

  static SK_DEVICE int64_t slot_of(const StateUpdateArgs& u, int64_t b) {
    if (u.indices == nullptr) return b;
    return Indices{u.indices, u.indices_b, u.indices_are_int64 != 0}[b];
  }

  // Rows of the batch that this thread serves, with what a row needs once.
  struct Row {
    int64_t b, slot;
    F x, d, y;
  };

  static SK_DEVICE Row begin_row(const StateUpdateArgs& u, int64_t b, int64_t h, int64_t p) {
    Row r{b, b < u.batch ? slot_of(u, b) : -1, 0, 0, 0};
    if (r.slot < 0) return r;
    r.x = widen(*at<T>(u.x, b * u.x_b + h * u.x_h + p * u.x_p));
    r.d = widen(*at<T>(u.dt, b * u.dt_b + h * u.dt_h + p * u.dt_p));
    if (u.dt_bias) r.d += *at<F>(u.dt_bias, h * u.bias_h + p * u.bias_p);
    if (u.softplus) r.d = softplus(r.d);
    return r;
  }

  static SK_DEVICE void end_row(const StateUpdateArgs& u, const Row& r, int64_t h, int64_t p) {
    if (r.b >= u.batch) return;
    F y = r.y;
    if (u.D) y += *at<F>(u.D, h * u.D_h + p * u.D_p) * r.x;
    if (u.z && r.slot >= 0) y *= silu(F(widen(*at<T>(u.z, r.b * u.z_b + h * u.z_h + p * u.z_p))));
    static_cast<T*>(u.out)[(r.b * u.heads + h) * u.dim + p] = narrow<T>(r.slot < 0 ? F(0) : y);
  }

  static SK_DEVICE void run(const Args& a) {
    const StateUpdateArgs& u = a.u;
    const int lane = thread_index() % a.lanes;
    const int64_t group = block_index() / a.row_blocks;
    const int64_t row = block_index() % a.row_blocks * (kThreads / a.lanes) + thread_index() / a.lanes;
    const bool active = row < u.heads * u.dim;
    const int64_t h = active ? row / u.dim : 0, p = active ? row % u.dim : 0, g = h / u.heads_per_group;
    Row rows[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) rows[i] = begin_row(u, active ? group * kBatch + i : u.batch, h, p);
    for (int64_t n = 4 * lane; n < u.states; n += 4 * a.lanes) {
      const int count = u.states - n < 4 ? int(u.states - n) : 4;
      F A[4], states[kBatch][4];
      load_four(at<F>(u.A, h * u.A_h + p * u.A_p + n * u.A_n), u.A_n, count, a.A_packed, A);
      const int64_t offset = h * u.state_h + p * u.state_p + n * u.state_n;
      with_type(u.state_dtype, [&]<class S>(S*) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (rows[i].slot >= 0)
            load_four(at<S>(u.state, offset + rows[i].slot * u.state_s), u.state_n, count, a.state_packed, states[i]);
      });
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        Row& r = rows[i];
        if (r.slot < 0) continue;
        F B[4], C[4];
        load_four(at<T>(u.B, r.b * u.B_b + g * u.B_g + n * u.B_n), u.B_n, count, a.B_packed, B);
        load_four(at<T>(u.C, r.b * u.C_b + g * u.C_g + n * u.C_n), u.C_n, count, a.C_packed, C);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const F decay = exp2_unit(r.d * (A[e] * F(1.4426950408889634074)));
          states[i][e] = fused(decay, states[i][e], r.d * r.x * B[e]);
          if (e < count) r.y = fused(C[e], states[i][e], r.y);
        }
      }
      with_type(u.state_dtype, [&]<class S>(S*) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (rows[i].slot >= 0) {
            S* to = static_cast<S*>(u.state) + offset + rows[i].slot * u.state_s;
            store_four(to, u.state_n, count, a.state_packed, states[i]);
          }
      });
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      for (int m = 1; m < a.lanes; m *= 2) rows[i].y += shuffle_xor(rows[i].y, m);
      if (active && lane == 0) end_row(u, rows[i], h, p);
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
  with_type(u.io_dtype, [&]<class T>(T*) {
    using Kernel = StateUpdate<T>;
    with_type(u.state_dtype, [&]<class S>(S*) { a.state_packed = packed(state, sizeof(S)); });
    a.A_packed = packed(A, sizeof(Compute<T>)), a.B_packed = packed(B, sizeof(T)), a.C_packed = packed(C, sizeof(T));
    a.lanes = power_of_two_from(ceil_div(u.states, 4));
    a.lanes = a.lanes > 32 ? 32 : a.lanes;
    a.row_blocks = ceil_div(u.heads * u.dim, Kernel::kThreads / a.lanes);
    exec.template launch<Kernel>(a.row_blocks * ceil_div(u.batch, Kernel::kBatch), 0, a);
  });
}

}  // namespace scalekern::update
