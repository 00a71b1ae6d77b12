// The Hadamard transform of rows, and its quantization to integers of a scale a group.
//
// Bound: memory from a few rows on; log2 n stages of half an addition a point are 0.8 clocks a point at n = 8192.
// Split: rows over threads.
// Passes: the first reads x, the last writes the output, those between run over a row in L1, three stages each (four
//   with 32 registers). The largest distances come first, so that what follows is runs that lie in L1 by themselves.
// Order of additions: the same for every layout, so that strides change no bit of the result.
#include "common/parallel.h"
#include "quant_matmul/cpu_hadamard_passes.h"
#include "quant_matmul/cpu_quantize.h"
#include "quant_matmul/hadamard.h"

namespace {

using scalekern::HadamardArgs;

constexpr int64_t kParallel = 1 << 15;  // points from which threads pay
constexpr int64_t kApartBytes = 64;     // between runs of the buffer: their lines would meet in one set of the L1
constexpr int kRunBits = 12;            // of runs that are finished pass by pass, not run by run

template <class F, class S>
struct Transform {
  static constexpr int W = kLanes<F>, w = kLaneBits<F>, kGap = int(kApartBytes / sizeof(F));
  const HadamardArgs& a;
  const int64_t padded = a.m << a.k;
  const F scale = F(a.scale);
  int32_t offsets[40 * 10];
  mutable const char* ahead = nullptr;  // of the next row
  F *buffer, *line;  // the row between passes; the row before the first one, where x is not read by it

  explicit Transform(const HadamardArgs& args) : a(args) {
    const size_t room = size_t(padded < W ? W : padded) * (tiled() ? W : 1) + size_t(64 * kGap);
    buffer = static_cast<F*>(__builtin_malloc(sizeof(F) * 2 * room));
    line = buffer + room;
    for (int64_t i = 0; i < a.m && a.m > 1; ++i)
      for (int64_t g = 0; g < a.m / 4; ++g)
        offsets[i * (a.m / 4) + g] = int32_t(16 * g + (uint64_t(a.signs[i]) >> (4 * g) & 15));
  }
  Transform(const Transform&) = delete;
  ~Transform() { __builtin_free(buffer); }

  bool packed() const { return a.stride_n == 1 && (a.axes == 0 || (a.axes == 1 && a.stride[0] == a.n)); }
  bool tiled() const { return a.m > 1 && a.k < w; }  // runs shorter than a vector: then lanes are rows

  template <class T>
  void base(F* to, int64_t pitch, const T* from, int64_t apart) const {
    switch (a.m / 4) {
      case 3: return base_pass<F, 3>(to, pitch, from, apart, offsets);
      case 5: return base_pass<F, 5>(to, pitch, from, apart, offsets);
      case 7: return base_pass<F, 7>(to, pitch, from, apart, offsets);
      default: return base_pass<F, 10>(to, pitch, from, apart, offsets);
    }
  }

  // One pass at the top of a run of 2^k points; returns the bits that are left.
  template <class T>
  static int top_pass(F* to, int64_t extra, const T* from, int k) {
    const int rest = k - w - kStages, passes = (rest + kMostStages - 1) / kMostStages, bits = (rest + passes - 1) / passes;
    const int64_t apart = int64_t(1) << (k - bits);
    if (bits == 1) pass<F, 1>(to, apart + extra, from, apart);
    else if (bits == 2) pass<F, 2>(to, apart + extra, from, apart);
    else if (bits == 3) pass<F, 3>(to, apart + extra, from, apart);
    else pass<F, 4>(to, apart + extra, from, apart);
    return k - bits;
  }

  // The stages of a run of 2^k points in the buffer that the last pass leaves, then that.
  template <class D>
  void finish(D* to, F* run, int k) const {
    if (k <= w + kStages) return last(to, run, int64_t(1) << k, k);
    const int left = top_pass(run, 0, run, k);
    const int64_t part = int64_t(1) << left;
    if (k > kRunBits) {
      for (int64_t i = 0; i < int64_t(1) << k; i += part) finish(to + i, run + i, left);
      return;
    }
    int bits = left;
    while (bits > w + kStages) {
      int next = bits;
      for (int64_t i = 0; i < int64_t(1) << k; i += int64_t(1) << bits) next = top_pass(run + i, 0, run + i, bits);
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
    narrow(to, from, size, k);
  }

  // Rows shorter than a vector, one after the other.
  template <class T, class D>
  void narrow(D* to, const T* from, int64_t size, int k) const {
    if (k == 0) return last_pass<F, 0, 0>(to, from, size, scale, ahead);
    if constexpr (w > 1)
      if (k == 1) return last_pass<F, 1, 0>(to, from, size, scale, ahead);
    if constexpr (w > 2)
      if (k == 2) return last_pass<F, 2, 0>(to, from, size, scale, ahead);
    if constexpr (w > 3)
      if (k == 3) return last_pass<F, 3, 0>(to, from, size, scale, ahead);
  }

  // A row of m 2^k points, 2^k at least a vector.
  template <class T, class D>
  void row(D* to, const T* from) const {
    const int k = int(a.k);
    const int64_t run = int64_t(1) << k;
    if (a.m > 1) {
      base(buffer, run + kGap, from, run);
      for (int64_t i = 0; i < a.m; ++i) finish(to + i * run, buffer + i * (run + kGap), k);
    } else if (k <= w + kStages) {
      last(to, from, run, k);
    } else {
      const int left = top_pass(buffer, kGap, from, k);
      const int64_t part = int64_t(1) << left;
      for (int64_t i = 0; i * part < run; ++i) finish(to + i * part, buffer + i * (part + kGap), left);
    }
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

  // The n first points of a transformed row to where they belong.
  void deliver(int64_t i, const F* y) const {
    if (a.out) return store_line(static_cast<S*>(a.out) + i * a.n, 1, a.n, y);
    const int64_t groups = a.n / a.group;
    for (int64_t g = 0; g < groups; ++g)
      quantize(a.q + i * a.n + g * a.group, a.scales + i * groups + g, y + g * a.group, a.group, a.most);
  }

  void rows(int64_t begin, int64_t end) const {
    if (padded == a.n && a.out) {
      if constexpr (__is_same(S, bf16))
        if (a.m == 1 && a.k > w && a.k <= w + kStages) return whole_rows<Paired, Paired>(begin, end);
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
    const auto one = [&](int64_t i, const auto* from) {
      if constexpr (__is_same(T, Paired)) last(out + i * a.n, from, a.n, int(a.k));
      else row(out + i * a.n, from);
    };
    for (int64_t i = begin; i < end; ++i) {
      if (a.stride_n == 1) {
        ahead = i + 1 < end ? reinterpret_cast<const char*>(x(i + 1)) : nullptr;
        one(i, x(i));
      } else {
        L* const gathered = reinterpret_cast<L*>(line);
        gather(i, gathered);
        one(i, static_cast<const L*>(gathered));
      }
    }
  }

  // Rows shorter than a vector: several in one.
  void narrow_rows(int64_t begin, int64_t end) const {
    const int k = int(a.k);
    int64_t i = begin;
    if (padded == a.n && a.out && packed()) {
      const int64_t points = (end - begin) / (W / padded) * W;
      narrow(static_cast<S*>(a.out) + i * a.n, row_of_x(i), points, k);
      i += points / padded;
    }
    while (i < end) {
      const int64_t count = end - i < W / padded ? end - i : W / padded;
      for (int64_t r = 0; r < count; ++r) gather(i + r, line + r * padded);
      narrow(line, static_cast<const F*>(line), W, k);
      for (int64_t r = 0; r < count; ++r, ++i) {
        for (int64_t j = 0; j < a.n; ++j) buffer[j] = line[r * padded + j];
        deliver(i, buffer);
      }
    }
  }

  // W rows at a time, a lane each, where runs are shorter than a vector.
  void tiles_of_rows(int64_t begin, int64_t end) const {
    const int64_t run = W << a.k;
    for (int64_t i = begin; i < end; i += W) {
      const int lanes = int(end - i < W ? end - i : W);
      if (a.axes <= 1) {
        load_tile(row_of_x(i), a.axes ? a.stride[0] : 0, a.stride_n, lanes, a.n, line);
      } else {
        for (int lane = 0; lane < W; ++lane) {
          const S* x = row_of_x(lane < lanes ? i + lane : i);
          for (int64_t j = 0; j < a.n; ++j) line[j * W + lane] = F(to_float(x[j * a.stride_n]));
        }
      }
      __builtin_memset(line + a.n * W, 0, sizeof(F) * size_t((padded - a.n) * W));
      base(buffer, run, static_cast<const F*>(line), run);
      if (a.k == 0) last_pass<F, 0, 0>(line, buffer, padded * W, scale, ahead);
      else if (a.k == 1) last_pass<F, 0, 1>(line, buffer, padded * W, scale, ahead);
      else if (a.k == 2) last_pass<F, 0, 2>(line, buffer, padded * W, scale, ahead);
      else last_pass<F, 0, 3>(line, buffer, padded * W, scale, ahead);
      if (a.out) {
        store_tile(static_cast<S*>(a.out) + i * a.n, a.n, 1, lanes, a.n, line);
        continue;
      }
      store_tile(buffer, a.n, 1, lanes, a.n, line);
      for (int lane = 0; lane < lanes; ++lane) deliver(i + lane, buffer + lane * a.n);
    }
  }

  static void run(const HadamardArgs& a) {
    const auto part = [&](int64_t begin, int64_t end) {
      const Transform transform(a);
      if (transform.tiled()) transform.tiles_of_rows(begin, end);
      else if (a.k < w) transform.narrow_rows(begin, end);
      else transform.rows(begin, end);
    };
    if (a.rows * a.n >= kParallel) scalekern::parallel(a.rows, part);
    else part(0, a.rows);
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
