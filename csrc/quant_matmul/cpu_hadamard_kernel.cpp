// The Hadamard transform of rows, and its quantization to integers of a scale a group.
//
// Numbers: one core of a Sapphire Rapids at 2.8 GHz, two for rates; "copy" is memcpy of the same rows.
// Bound: memory for short rows; from n = 4096 on the vector units as well. A vector of 16 floats of n = 8192 costs 9
//   additions, 7 operations of its lanes and the scale on two ports, 8.5 clocks: 1.6 us a row, measured 2.3 in two
//   passes that come out of the L2 (the 32 KB of a row and the 32 KB of the buffer are more than an L1: a memcpy of a
//   row there is 0.85), where a copy of 24 MB by two threads allows 2.6 us. fp16 has 4 conversions more, 11.5 clocks or
//   2.1 us, of 1.3 us that a copy takes: half a copy's rate would have to hide all of its memory. bf16 without tiles
//   (cpu_hadamard_tiles.h) has 6 more, 2.8 us. H_m is bound by loads: an output of two vectors reads an offset, a sign
//   and two sums for each of its m / 4 terms; that is 14 loads a vector and 3 ns for m = 28, 1.4 ns for m = 12. Where
//   its signs are known at compile time (known_pass), by additions: 5 a vector for m = 12, 9 for 28.
// Split: rows over threads, a share at a time to whichever is free: halves ended with the slower core, floats of 24 MB
//   10 to 25 % later, both by turns in one process.
// Passes: the first reads x, the last writes the output, those between run over a row in L1, three stages each (four
//   with 32 registers; five where the first of two passes can read x twice). The largest distances come first, so that
//   what follows is runs that lie in L1 by themselves.
// Order of additions: the same for every layout, so that strides change no bit of the result.
// What it took, rows of 8,192 floats in L2 6.7 to 2.6 us: butterflies inlined by force (GCC 12 had left half of them a
//   call, with all vectors through memory); a buffer that begins at a line (malloc's 16 bytes made every vector two
//   lines); one address for four runs (16 were kept in vector registers); half of H_m's table of sums; one last pass
//   for all runs, float of 192 points 9.2 to 6.5 ns a vector, of 640 10.9 to 8.5, of 896 10.2 to 9.4.
// Tried and lost, two threads, 8 and 24 MB: prefetching (next row into L1 or L2, the output, both, in bulk or a few
//   lines a step): float of 512 points 0.70 to 0.79 of a copy's rate, but 8,192 0.55 to 0.48, and bf16 of 4,096 0.60
//   to 0.40; the next row's first pass between the runs of this one's last, so that memory is read and written at once:
//   float 4,096 0.64 to 0.53, 8,192 even; four vectors at a time for H_m: 3 % for 12 2^k, a loss for rows of 5,120.
//   On a Zen 5 the two upper stages of lanes as four loads that repeat a quarter, without shuffles: floats of 64 points
//   5.4 to 5.9 cycles a vector, of 1,024 8.5 to 9.1, bf16 the same.
#include <stdlib.h>

#include "common/stretches.h"
#include "quant_matmul/cpu_hadamard_tile_rows.h"
#include "quant_matmul/cpu_quantize.h"
#include "quant_matmul/hadamard.h"

namespace {

using scalekern::HadamardArgs;

constexpr int64_t kParallel = 1 << 17;      // points from which threads pay: 64 Ki took 36 us with one, 43 with two
constexpr int64_t kShare = 1 << 17;        // points that a thread takes at once
constexpr int64_t kApartBytes = 64;        // between runs of the buffer: their lines would meet in one set of the L1
constexpr int kRunBits = 12;               // of runs that are finished pass by pass, not run by run
// Whether the last pass asks for the next row as it goes: two threads of a Sapphire Rapids, 24 MB, fp16 of 1,024 points
// 0.51 to 0.62 of a copy's rate, of 4,096 0.40 to 0.46; float 0.83 to 0.74 and 0.64 to 0.53. Of a Zen 5, float of 4,096
// points 1.04 to 0.66 ms, of 8,192 1.08 to 0.76; halves without it 1.3 to 1.7 times as long.
template <class S>
static bool asks_ahead() {
#if defined(__AVX512F__)
  return sizeof(S) == 2 || !scalekern::has_amx();
#else
  return true;
#endif
}

template <class F, class S>
struct Transform {
  static constexpr int W = kLanes<F>, w = kLaneBits<F>, kGap = int(kApartBytes / sizeof(F));
  const HadamardArgs& a;
  const int64_t padded = a.m << a.k;
  const F scale = F(a.scale);
  const BaseMatrix<F> base;
#if defined(__AVX512F__)
  const TileRows<S> tile_rows{a};
#endif
  mutable const char* ahead = nullptr;  // of the next row
  // A tile of rows, or the sums of 32; or a row, or some that go through tiles together.
  const int64_t points = tiled() ? (padded < 640 ? 640 : padded) * W : padded < 2048 ? 2048 : padded;
  const int64_t room = points + 64 * kGap;
  F *buffer, *line;  // the row between passes; the row before the first one, where x is not read by it

  explicit Transform(const HadamardArgs& args) : a(args), base(args.signs, args.m) {
    buffer = static_cast<F*>(aligned_alloc(64, sizeof(F) * size_t(2 * room)));
    line = buffer + room;
  }
  Transform(const Transform&) = delete;
  ~Transform() { __builtin_free(buffer); }

  bool packed() const { return a.stride_n == 1 && (a.axes == 0 || (a.axes == 1 && a.stride[0] == a.n)); }
  bool tiled() const { return a.m > 1 && a.k < w; }  // runs shorter than a vector: then lanes are rows

  // Stages of the pass at the top of a run, of which the last pass leaves `rest`.
  static int top_bits(int rest, bool in_place) {
    if (kStages == 4 && rest == 5 && !in_place) return 5;
    const int passes = (rest + kMostStages - 1) / kMostStages;
    return (rest + passes - 1) / passes;
  }

  template <class T>
  static void top_pass(F* to, int64_t pitch, const T* from, int64_t from_pitch, int64_t columns, int bits) {
    if (bits == 1) return pass<F, 1>(to, pitch, from, from_pitch, columns);
    if (bits == 2) return pass<F, 2>(to, pitch, from, from_pitch, columns);
    if (bits == 3) return pass<F, 3>(to, pitch, from, from_pitch, columns);
    if constexpr (kStages == 4)
      if (bits == 5) return pass<F, 5>(to, pitch, from, from_pitch, columns);
    pass<F, 4>(to, pitch, from, from_pitch, columns);
  }

  // The same in place at the top of a run of 2^k points, of which the last pass makes `low`; returns the bits left.
  template <int low>
  static int top_pass(F* run, int k) {
    const int bits = top_bits(k - low, true);
    const int64_t apart = int64_t(1) << (k - bits);
    top_pass(run, apart, static_cast<const F*>(run), apart, apart, bits);
    return k - bits;
  }

  // The stages of a run of 2^k points in the buffer that the last pass leaves, then that.
  template <class D>
  void finish(D* to, F* run, int k) const {
    if (k <= w + kStages) return last(to, run, int64_t(1) << k, k);
    const int left = top_pass<w + kStages>(run, k);
    const int64_t part = int64_t(1) << left;
    if (k > kRunBits) {
      for (int64_t i = 0; i < int64_t(1) << k; i += part) finish(to + i, run + i, left);
      return;
    }
    int bits = left;
    while (bits > w + kStages) {
      int next = bits;
      for (int64_t i = 0; i < int64_t(1) << k; i += int64_t(1) << bits)
        next = top_pass<w + kStages>(run + i, bits);
      bits = next;
    }
    last(to, run, int64_t(1) << k, bits);
  }

  template <class T, class D>
  void last(D* to, const T* from, int64_t size, int k) const {
    switch (k - w) {
      case 0: return last_pass<F, w, 0>(to, from, size, scale, ahead);
      case 1: return last_pass<F, w, 1>(to, from, size, scale, ahead);
      case 2: return last_pass<F, w, 2>(to, from, size, scale, ahead);
      case 3: return last_pass<F, w, 3>(to, from, size, scale, ahead);
    }
    if constexpr (kStages > 3)
      if (k - w == 4) return last_pass<F, w, 4>(to, from, size, scale, ahead);
    narrow<w>(to, from, size, k);
  }

  // Rows of 2^k points up to a vector, one after the other; those of pairs fill two, which the last stage joins.
  template <int bits, class T, class D>
  void narrow(D* to, const T* from, int64_t size, int k) const {
    constexpr int joined = kVectors<D> - 1;
    if constexpr (bits > joined)
      if (k < bits) return narrow<bits - 1>(to, from, size, k);
    last_pass<F, bits - joined, joined>(to, from, size, scale, ahead);
  }

  // A row of m 2^k points, 2^k at least a vector. The runs lie without gaps where one last pass takes them all.
  template <class T, class D>
  void row(D* to, const T* from) const {
    const int k = int(a.k), bits = a.m == 1 && k > w + kStages ? top_bits(k - w - kStages, false) : 0, left = k - bits;
    const bool at_once = left <= w + kStages;
    const int64_t runs = a.m << bits, run = int64_t(1) << left, pitch = at_once ? run : run + kGap;
    if (runs == 1) return last(to, from, run, left);
    if (a.m > 1) base.multiply(buffer, pitch, from, run, run);
    else top_pass(buffer, pitch, from, run, run, bits);
    if (at_once) return last(to, buffer, padded, left);
    for (int64_t i = 0; i < runs; ++i) finish(to + i * run, buffer + i * pitch, left);
  }

  const S* row_of_x(int64_t i) const {
    int64_t offset = 0;
    for (int axis = a.axes - 1; axis > 0; --axis) {
      offset += i % a.size[axis] * a.stride[axis];
      i /= a.size[axis];
    }
    return static_cast<const S*>(a.x) + offset + (a.axes ? i * a.stride[0] : 0);
  }

  // T: F, or what S is stored as.
  template <class T>
  void gather(int64_t i, T* to) const {
    const S* x = row_of_x(i);
    if constexpr (__is_same(T, F)) load_line(x, a.stride_n, a.n, to);
    else for (int64_t j = 0; j < a.n; ++j) __builtin_memcpy(to + j, x + j * a.stride_n, sizeof(T));
    __builtin_memset(to + a.n, 0, sizeof(T) * size_t(padded - a.n));
  }

  // f<how pairs of bf16 are read and written>
  template <class Body>
  static void in_pairs(const Body& f) {
#if defined(__AVX512F__)
    if (scalekern::has_bf16()) return f.template operator()<Dotted>();
#endif
    f.template operator()<Paired>();
  }

  // The n first points of a transformed row to where they belong.
  void deliver(int64_t i, const F* y) const {
    if (a.out) return store_line(static_cast<S*>(a.out) + i * a.n, 1, a.n, y);
    const int64_t groups = a.n / a.group;
    for (int64_t g = 0; g < groups; ++g)
      quantize(a.q + i * a.n + g * a.group, a.scales + i * groups + g, y + g * a.group, a.group, a.most);
  }

  void rows(int64_t begin, int64_t end) const {
    if (padded == a.n && a.out) {
      if constexpr (__is_same(S, bf16)) {
        if (a.k > w) return in_pairs([&]<class T>() { whole_rows<T, T>(begin, end); });
        if (a.m == 1) in_pairs([&]<class T>() { begin += packed_narrow<T>(begin, end); });
      }
      return whole_rows<S, F>(begin, end);
    }
    for (int64_t i = begin; i < end; ++i) {
      if (padded == a.n && a.stride_n == 1) {
        row(line, row_of_x(i));
      } else {
        gather(i, line);
        row(line, static_cast<const F*>(line));
      }
      deliver(i, line);
    }
  }

  // Written where they belong as they are made. T: what S is read and written as; L: as what it is gathered.
  template <class T, class L>
  void whole_rows(int64_t begin, int64_t end) const {
    const auto x = [&](int64_t i) { return reinterpret_cast<const T*>(row_of_x(i)); };
    T* const out = static_cast<T*>(a.out);
    if (a.stride_n == 1 && a.m == 1 && a.k <= w + kStages && packed())
      return last(out + begin * a.n, x(begin), (end - begin) * a.n, int(a.k));
    const bool asks = asks_ahead<S>();
    for (int64_t i = begin; i < end; ++i) {
      if (a.stride_n == 1) {
        ahead = asks && i + 1 < end ? reinterpret_cast<const char*>(x(i + 1)) : nullptr;
        row(out + i * a.n, x(i));
      } else {
        gather(i, reinterpret_cast<L*>(line));
        row(out + i * a.n, reinterpret_cast<const L*>(line));
      }
    }
  }

  // Of rows that follow each other as many as fill all vectors; returns how many those are.
  template <class T>
  int64_t packed_narrow(int64_t begin, int64_t end) const {
    if (padded != a.n || !a.out || !packed()) return 0;
    const int64_t points = (end - begin) * a.n / (kVectors<T> * W) * (kVectors<T> * W);
    narrow<w>(static_cast<T*>(a.out) + begin * a.n, reinterpret_cast<const T*>(row_of_x(begin)), points, int(a.k));
    return points / a.n;
  }

  // Rows shorter than a vector: several in one.
  void narrow_rows(int64_t i, int64_t end) const {
    if constexpr (__is_same(S, bf16))
      if (a.k > 0) in_pairs([&]<class T>() { i += packed_narrow<T>(i, end); });
    i += packed_narrow<S>(i, end);
    while (i < end) {
      const int64_t count = end - i < W / padded ? end - i : W / padded;
      for (int64_t r = 0; r < count; ++r) gather(i + r, line + r * padded);
      narrow<w>(line, static_cast<const F*>(line), W, int(a.k));
      for (int64_t r = 0; r < count; ++r, ++i) deliver(i, line + r * padded);
    }
  }

  // The n points in columns that tiles take whole: of the last W some are done twice.
  template <class Body>
  void in_columns(bool whole, const Body& body) const {
    if (!whole || a.n < W) return body(0, a.n);
    body(0, a.n / W * W);
    if (a.n % W) body(a.n - W, W);
  }

  // W rows at a time, a lane each, where runs are shorter than a vector.
  void tiles_of_rows(int64_t begin, int64_t end) const {
    const int64_t run = W << a.k;
    for (int64_t i = begin; i < end; i += W) {
      const int lanes = int(end - i < W ? end - i : W);
      if (a.axes <= 1) {
        const S* const x = row_of_x(i);
        const int64_t apart = a.axes ? a.stride[0] : 0;
        if (a.n < W && i + W < a.rows && packed()) load_tile(x, a.n, 1, W, W, line);  // of the next row's, too
        else in_columns(lanes == W && a.stride_n == 1, [&](int64_t j, int64_t count) {
          load_tile(x + j * a.stride_n, apart, a.stride_n, lanes, count, line + j * W);
        });
      } else {
        for (int lane = 0; lane < W; ++lane) {
          const S* x = row_of_x(lane < lanes ? i + lane : i);
          for (int64_t j = 0; j < a.n; ++j) line[j * W + lane] = F(to_float(x[j * a.stride_n]));
        }
      }
      __builtin_memset(line + a.n * W, 0, sizeof(F) * size_t((padded - a.n) * W));
      base.multiply(buffer, run, static_cast<const F*>(line), run, run);
      if (a.k == 0) last_pass<F, 0, 0>(line, buffer, padded * W, scale, ahead);
      else if (a.k == 1) last_pass<F, 0, 1>(line, buffer, padded * W, scale, ahead);
      else if (a.k == 2) last_pass<F, 0, 2>(line, buffer, padded * W, scale, ahead);
      else last_pass<F, 0, 3>(line, buffer, padded * W, scale, ahead);
      if (a.out) {
        S* const to = static_cast<S*>(a.out) + i * a.n;
        if constexpr (W == 16)
          if (a.n == 12 && lanes == W) {
            S wide[W * W];
            store_tile(wide, W, 1, W, W, line);
            for (int lane = 0; lane < W; ++lane) __builtin_memcpy(to + lane * 12, wide + lane * W, 12 * sizeof(S));
            continue;
          }
        in_columns(lanes == W, [&](int64_t j, int64_t count) {
          store_tile(to + j, a.n, 1, lanes, count, line + j * W);
        });
        continue;
      }
      store_tile(buffer, a.n, 1, lanes, a.n, line);
      for (int lane = 0; lane < lanes; ++lane) deliver(i + lane, buffer + lane * a.n);
    }
  }

  static void run(const HadamardArgs& a) {
    const int64_t unit = a.n < kShare / W ? W : 1, share = kShare / a.n / unit > 1 ? kShare / a.n / unit : 1;
    parallel_stretches(a.rows * a.n >= kParallel, (a.rows + unit - 1) / unit, share, [&](const auto& take) {
      const Transform transform(a);
      take([&](int64_t begin, int64_t end) {
        transform.some(begin * unit, end * unit < a.rows ? end * unit : a.rows);
      });
    });
  }

  void some(int64_t begin, int64_t end) const {
#if defined(__AVX512F__)
    if (tile_rows.take(*this, begin, end)) return;
#endif
    tiled() ? tiles_of_rows(begin, end) : a.k < w ? narrow_rows(begin, end) : rows(begin, end);
  }
};

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void hadamard(const HadamardArgs& a) {
  switch (a.dtype) {  // enum Dtype
    case 0: return Transform<float, float>::run(a);
    case 1: return Transform<double, double>::run(a);
    case 2: return Transform<float, f16>::run(a);
    default: return Transform<float, bf16>::run(a);
  }
}

}  // namespace scalekern::SCALEKERN_ISA
