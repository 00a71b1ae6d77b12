// Products of tiles with the signs of H_m, of halves as they lie in x: whole rows of up to 160 points, and the runs of
// longer bfloat16 ones. Where common/amx.h's has_amx().
//
// Bound: a product of tiles is 16 clocks, a store 16 that overlap little with it. Whole rows take n / 32 products a
//   vector of sums, float16 twice as many; runs take 1 for m = 12 and 2 for the others. That is in place of 13 to 21
//   operations a vector, half of them loads (cpu_hadamard_kernel.cpp). On a core whose other thread is busy, as a
//   virtual one's may be, additions and loads come at 0.8 a clock instead of 2, products mostly as before; but for
//   seconds at a time they took 40 to 60 clocks there.
// Nanoseconds a vector of 16 and core, two such threads, 24 MB, by turns in one process with the code before (a copy
//   2.4 to 3): bfloat16 12 points 10.2 to 3.2, 28 11.5 to 4.1, 56 10.8 to 4.8, 160 11.1 to 9.8, 192 9.3 to 5.4, 448
//   12.4 to 7.3, 896 6.4 to 5.1, 7,168 8.4 to 6.9; float16 12 8.7 to 4.4, 28 9.0 to 4.9.
// Longer runs of known signs (cpu_hadamard_passes.h) are faster after H_32: bfloat16 of 7,168 points 8.4 to 6.2, of
//   1,792 4.6 to 4.0. Below half of a copy's rate: bfloat16 of 80 to 640 points of 28 2^k and 40 2^k, where a row is
//   n / 32 products a vector, or H_m's 2, their stores and four stages of lanes, 14 operations; float16 of 40 to 160.
// Tried and lost: float16 as whole rows of 40 points 8.6 to 6.9 ns, but 16 to 21 while products are slow, of 80 8.9 to
//   10.4; runs of m = 12 from k = 6 on and of 40 from k = 5, 5.1 to 5.9 of 768 and 9.2 to 9.9 of 5,120; after H_32, H_m
//   of the sums in two parts, any m and k, both types: 1.2 to 1.8 times longer, since tiles wait for what vectors have
//   just stored; a load of zeros instead of tilezero, 1.1 to 1.7 times longer.
#pragma once
#include "quant_matmul/cpu_hadamard_tiles.h"
#include "quant_matmul/hadamard.h"

#if defined(__AVX512F__)
namespace {

// Of bfloat16 numbers that make a point: a float16 is the sum of two, exactly.
template <class S>
constexpr int kParts = __is_same(S, f16) ? 2 : 1;

// Both parts of each point in its lane, under the same sign; those of an infinity are it and a number, not NaN.
static inline VecF two_parts(VecF x) {
  const Words high = Words(x) & 0xffff0000;
  const VecF low = (VecF)_mm512_min_ps((__m512)(x - VecF(high)), _mm512_set1_ps(1e30f));
  return VecF(high | Words(low) >> 16);
}

// 32 numbers of a tile's row: bit j of even and of odd makes number 2 j and the next one -1 instead of 1. One by one
// they took 115 us of a call with 160 points.
static inline void store_signs(uint16_t* row, uint32_t even, uint32_t odd) {
  const __mmask32 negative = _pdep_u32(even, 0x55555555) | _pdep_u32(odd, 0xaaaaaaaa);
  _mm512_store_si512(row, _mm512_mask_blend_epi16(negative, _mm512_set1_epi16(0x3f80), _mm512_set1_epi16(-0x4080)));
}

// The matrix of n points in tiles, and 32 rows at a time by it. No tile has zeros in place of what is not there: a
// NaN would not stay in its row.
template <class S>
class WholeProduct {
 public:
  static constexpr int64_t kRows = 32, kMostParts = __is_same(S, f16) ? 56 : 160;

  explicit WholeProduct(const scalekern::HadamardArgs& a)
      : n_(takes(a) ? a.n : 0), step_(part(n_ * kParts<S>, 32)), steps_(n_ * kParts<S> / step_),
        columns_(part(n_, 16)) {
    signs_ = static_cast<Tile*>(aligned_alloc(64, sizeof(Tile) * size_t(steps_ * (n_ / columns_))));
    if (!n_) return;
    uint64_t column[40] = {};  // bit i: H_m's sign there in row i
    for (int l = 0; l < a.m; ++l)
      for (int i = 0; i < a.m; ++i) column[l] |= uint64_t(a.signs[i] >> l & 1) << i;
    const uint32_t run = 1u << a.k, heads = 0xffff / ((1u << run) - 1);  // a bit for each run of columns
    const auto signs = [&](int64_t slot, int64_t first) {  // of a tile's columns; Sylvester's change with i & point
      const uint32_t point = uint32_t(slot / kParts<S>), low = point & (run - 1);
      const uint32_t runs = _pdep_u32(uint32_t(column[point >> a.k] >> (first >> a.k)), heads) * ((1u << run) - 1);
      return runs ^ (low & 1 ? 0xaaaa : 0) ^ (low & 2 ? 0xcccc : 0) ^ (low & 4 ? 0xf0f0 : 0);
    };
    for (int64_t i = 0; i < n_; i += columns_)
      for (int64_t l = 0; l < n_ * kParts<S>; l += 2)
        store_signs(tile(l / step_, i / columns_).row[l % step_ / 2], signs(l, i), signs(l + 1, i));
  }
  WholeProduct(const WholeProduct&) = delete;
  ~WholeProduct() { __builtin_free(signs_); }

  explicit operator bool() const { return n_ > 0; }
  int64_t points() const { return kRows * n_; }

  void shape(Tiles& tiles) const {
    tiles.shape(0, 2, kTileRows, 2 * step_), tiles.shape(2, 2, step_ / 2, 4 * columns_);
    tiles.shape(4, 4, kTileRows, 4 * columns_);
  }

  // from: rows of kParts numbers a point, a pitch of bytes apart.  to: their sums, (kRows, n).
  void multiply(float* to, const void* from, int64_t pitch) const {
    const int64_t count = n_ / columns_;
    for (int64_t t = 0; t < count; t += 2)
      t + 1 < count ? columns<2>(to, from, pitch, t) : columns<1>(to, from, pitch, t);
  }

 private:
  struct alignas(64) Tile {
    uint16_t row[16][32];
  };

  static bool takes(const scalekern::HadamardArgs& a) {
    return sizeof(S) == 2 && a.out && a.m > 1 && a.n == a.m << a.k && a.n * kParts<S> <= kMostParts &&
           scalekern::has_amx();
  }
  static int64_t part(int64_t size, int64_t most) {  // the largest of even size that divides `size`
    while (size % most) most -= 2;
    return most;
  }
  Tile& tile(int64_t step, int64_t t) const { return signs_[t * steps_ + step]; }

  template <int J>
  void columns(float* to, const void* from, int64_t pitch, int64_t t) const {
    zero_tile<4>(), zero_tile<5>();
    if constexpr (J == 2) zero_tile<6>(), zero_tile<7>();
    const char* x = static_cast<const char*>(from);
    for (int64_t s = 0; s < steps_; ++s, x += 2 * step_) {
      load_tile<2>(&tile(s, t), kTileBytes), load_tile<0>(x, pitch), load_tile<1>(x + kTileRows * pitch, pitch);
      add_bf16_products<4, 0, 2>(), add_bf16_products<5, 1, 2>();
      if constexpr (J == 2) {
        load_tile<3>(&tile(s, t + 1), kTileBytes);
        add_bf16_products<6, 0, 3>(), add_bf16_products<7, 1, 3>();
      }
    }
    float* const y = to + t * columns_;
    store_tile<4>(y, 4 * n_), store_tile<5>(y + kTileRows * n_, 4 * n_);
    if constexpr (J == 2) store_tile<6>(y + columns_, 4 * n_), store_tile<7>(y + columns_ + kTileRows * n_, 4 * n_);
  }

  const int64_t n_, step_, steps_, columns_;
  Tile* signs_;
};

// bfloat16 rows of m runs of 2^k points, 8 or more each, by H_m (x) H_2 for m of 12, 20 and 28. A tile of x holds 16
// even columns of some runs and 16 odd ones in pairs: with each of H_m's signs twice they come as sums, and with the
// second one the other way as differences. Of 32 columns the sums come first.
class RunProduct {
 public:
  static constexpr int kLeast = 3;  // k

  RunProduct(const scalekern::HadamardArgs& a, bool taken)
      : k_(taken ? int(a.k) : 0), m_(a.m == 40 ? 20 : int(a.m)), parts_(m_ == 12 ? 1 : 2), runs_(m_ / parts_) {
    for (int i = 0; i < m_ && taken; ++i)
      for (int part = 0; part < parts_; ++part) {
        const uint32_t word = uint32_t(a.signs[i] >> (part * runs_));
        store_signs(signs_[0][i / runs_][part][i % runs_], word, word);
        store_signs(signs_[1][i / runs_][part][i % runs_], word, ~word);
      }
  }

  explicit operator bool() const { return k_ > 0; }
  int64_t points() const { return int64_t(m_) << k_; }

  void shape(Tiles& tiles) const {
    tiles.shape(0, 4, runs_, k_ < 5 ? 2 << k_ : kTileBytes), tiles.shape(4, 4, runs_, 4 * runs_);
    load_tile<6>(signs_[0], kTileBytes), load_tile<7>(signs_[1], kTileBytes);
  }

  void multiply(float* to, const bf16* from) const { parts_ == 1 ? by<1>(to, from) : by<2>(to, from); }

 private:
  template <int parts>
  void by(float* to, const bf16* from) const {
    const int64_t run = int64_t(1) << k_, half = run < 32 ? run / 2 : 16, part = runs_ * run;
    for (int64_t j = 0; j < run; j += 32, from += 32, to += 32) {
      load_tile<0>(from, 2 * run);
      if constexpr (parts == 2) load_tile<1>(from + part, 2 * run);
      for (int i = 0; i < parts; ++i) {
        zero_tile<2>(), zero_tile<3>();
        if constexpr (parts == 2) load_tile<6>(signs_[0][i][0], kTileBytes), load_tile<7>(signs_[1][i][0], kTileBytes);
        add_bf16_products<2, 6, 0>(), add_bf16_products<3, 7, 0>();
        if constexpr (parts == 2) {
          load_tile<4>(signs_[0][i][1], kTileBytes), load_tile<5>(signs_[1][i][1], kTileBytes);
          add_bf16_products<2, 4, 1>(), add_bf16_products<3, 5, 1>();
        }
        store_tile<2>(to + i * part, 4 * run), store_tile<3>(to + i * part + half, 4 * run);
      }
    }
  }

  const int k_, m_, parts_, runs_;
  alignas(64) uint16_t signs_[2][2][2][16][32];
};

template <class S>
static void store_scaled(S* to, const float* from, int64_t size, float scale) {
  for (int64_t i = 0; i < size; i += 32) {
    const VecF low = load(from + i) * scale, high = load(from + i + 16) * scale;
    if constexpr (__is_same(S, bf16)) _mm512_storeu_si512(to + i, to_bf16((__m512)low, (__m512)high));
    else store_as<float>(to + i, low), store_as<float>(to + i + 16, high);
  }
}

}  // namespace
#endif
