// Long convolution in 16 bits by one fused transform of three factors on the tensor cores, forward.
//
// Shape letters: B batch, D channels, N = N1 16 16 points, t = 256 n1 + 16 n2 + n3 a sample's place, k = k1 + N1 (k2 +
// 16 k3) a frequency's. The right-angle transform (triton_kernels/fft_conv.py) sums x[t] w^(t (k + 1/4)): N points hold
// a convolution of N samples, rows are real on the way in and on the way out.
//
//     X1[k1]         = sum over n1 of F1 x                  F1 = exp(-2 pi i n1 (k1 + 1/4) / N1)
//     X2[k1, k2]     = sum over n2 of F2 (X1 T1)            T1 = exp(-2 pi i n2 (k1 + 1/4) / (16 N1))
//     X3[k1, k2, k3] = sum over n3 of F3 (X2 T2)            T2 = exp(-2 pi i n3 (k1 + 1/4 + N1 k2) / N)
//
// and back with the conjugates in the other order. Python makes the tables (python/scalekern/ops/_fft_conv_cuda.py).
//
// N is 4,096 or 8,192 (N1 = 16, 32). Two rows of 2,048, four of 1,024 and so on to 16 of 256 are transformed together:
// F1 and its conjugate are then block diagonal. A longer row is cut into parts of 8,192: what a part sends to the p-th
// after it is a product with another spectrum of the filters, G_p, whose real lags begin at p N and whose imaginary
// ones, the lags below zero, at (p - 1) N. So part j costs one transform there and one back whatever j is, and j + 1
// products: y_j = sum over i of G_(j - i) x_i. Only filters that do not look ahead.
//
// Never measured. What bounds it, counted for B64 D768 L8,192, gates at both ends, 403 M points: 8 bytes a point, 0.67
// ms at 4.8 TB/s; products, 8 N1 + 16 16 + 16 16 = 768 flops a point (two factors: 2,048), 0.50 ms of mma.sync's some
// 620 TFLOP/s; shared memory, some 38 bytes a point, 0.3 clocks of an SM or 0.54 ms at 1.7 GHz; instructions: in the
// loops of sm_90a's code a lane has 1,032 for the 32 points that it has of a row, reading, gating, packing and writing
// are some 560 more: 50 a point of the 128 that an SM begins in a clock, 0.39 clocks or 0.70 ms. So instructions come
// first, at 0.96 of the byte floor, and what two blocks of an SM do not hide of each other comes on top: 0.6 of the
// floor is 1.12 ms. As much a point at L 1,024 to 4,096. In parts: at 16,384 55 instructions a point and 6 bytes of
// spectra from L2, 1.5 ms (0.4 of the byte floor: 3.4 ms); at 32,768 62 and 10 bytes, 3.5 ms (6.7), by 8 warps of an SM
// where the others have 16. What spills is read once a row, outside of the loops.
//
// Tried, as code: twiddles times float32 numbers, 14 instructions a point more and spills, 5.8e-4 of error for 6.8e-4
// in float16; spectra times float32 numbers, 4 instructions a point more in one part and 10 in four (7.1e-4 for 6.8e-4
// at 8,192, 9e-4 for 8.3e-4 in parts).
//
// Split: a block has a channel and some of its rows, one at a time, 8 warps. On side I of an exchange a warp has all
// k1 and k2 (n1 and n2) of two n3: results of the first factor are the left operand of the second as they lie in
// registers. On side II it has all n3 (k3) of some (k1, k2), and goes there and back: third factor, spectrum, inverse
// third factor, in registers again. So a row is exchanged twice through shared memory, 4 bytes a point, and once on the
// way in and out, where rows are read and written 16 bytes a thread.
//
// In shared memory: factors and twiddles (45 KB for N1 = 32), the channel's spectrum (32), and 37 KB that are in turn
// the row (float16, scaled by its largest sample), the exchange and the result (float32): 114 KB, twice in an SM. Of a
// row in parts the spectra come from L2, and the transforms of its parts stay here, 32 KB each but the last.
//
// Rows of an exchange are numbered by who has them on side I: rho = 32 j + lane, j = 8 (k1 / 16) + 4 (k1 / 8 % 2) +
// 2 (k2 / 8) + k2 % 2, lane = 4 (k1 % 8) + k2 % 8 / 2. A row has 8 pieces of 8 bytes: float16 real parts of n3 = 2 i
// and 2 i + 1, then imaginary ones. As a left operand 8 neighbouring numbers are re, im, re, im of two n3 each, and the
// third factor is a real matrix of 32 x 32 in that order. Pieces lie where conflicts of banks are few: `place`.
#pragma once
#include "fft_conv/cuda_fft_rows.cuh"

namespace scalekern::fft {

template <class T, int kN1, int kTogether, int kParts>
struct FusedConv : Rows<T, kN1, kTogether, kParts> {
  using Base = Rows<T, kN1, kTogether, kParts>;
  using Args = fft::Args;
  using Layout = Tables<kN1>;
  using Word4 = Pack<uint32_t>;
  using Base::a, Base::kN, Base::kThreads, Base::kIn1, Base::kIn2, Base::kOut1, Base::kOut2, Base::kStore;
  using Base::bring, Base::lane, Base::shared, Base::size, Base::take_away, Base::warp, Base::work;
  static constexpr int kBlocks = kParts > 2 ? 1 : 2, kTiles = kN1 / 16;

  const int g = lane / 4, q = lane % 4;

  SK_DEVICE const Word4& table(int offset, int i) const {
    return reinterpret_cast<const Word4*>(shared + offset)[i];
  }
  // Four words of the fragments that stay the same: read again each time, 48 registers otherwise.
  SK_DEVICE const Word4& fragment(int i) const {
    return reinterpret_cast<const Word4*>(reinterpret_cast<const unsigned char*>(a.tables) + Layout::kFragments)
        [i * 32 + lane];
  }

  // --- the exchange ---

  // Where piece i of row rho lies, in words; 512 further for rho + 32, 256 for rho + 16.
  static SK_DEVICE int place(int rho, int i) { return rho * 16 + ((i / 2) ^ (rho / 2 % 4)) * 4 + i % 2 * 2; }
  SK_DEVICE const uint32_t* outer() const { return reinterpret_cast<const uint32_t*>(shared + Layout::kOuter); }
  // Where T2 of row rho is for n3 = 2 i and 2 i + 1, in words; as far for rho + 16 and rho + 32.
  static SK_DEVICE int outer_place(int rho, int i) { return rho * 16 + (i ^ (rho / 2 % 8)) * 2; }
  static SK_DEVICE Pair get(const uint32_t* from) {
    const auto two = Group<uint32_t, 2>::load(from);
    return {two.words[0], two.words[1]};
  }
  SK_DEVICE void put(int at, Pair pair) const {
    Group<uint32_t, 2> two;
    two.words[0] = pair.re, two.words[1] = pair.im;
    two.store(work() + at);
  }
  // From row `lane` to this lane's row of a tile of 16 k1, half r of it, half c of the k2, odd or even k2: in words.
  static SK_DEVICE int row_of(int tile, int r, int c, int e) { return (((tile * 2 + r) * 2 + c) * 2 + e) * 512; }

  // From `work` as `bring` left it: first and second factor of n3 = 2 warp + s. Two barriers.
  SK_DEVICE void forward() const {
    uint32_t x[2][kTiles][2][2];  // [s][16 n1][8 n2]; of a lane n1 = q, q + 4 and q + 8, q + 12
#pragma unroll
    for (int block = 0; block < kTiles; ++block)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t* from = work() + (16 * block + 8 * half + q) * kIn1 + (8 * c + g) * kIn2 + warp;
          const uint32_t low = from[0], high = from[4 * kIn1];
          x[0][block][c][half] = lows(low, high), x[1][block][c][half] = highs(low, high);
        }
    sync_threads();
    const Word4 re = fragment(0), im = fragment(1);  // F2: [8 k2][half of the n2]
    const int mine = place(lane, warp);
    const uint32_t* twiddles = outer() + outer_place(lane, warp);
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      float y_re[2][2][4] = {}, y_im[2][2][4] = {};  // [s][8 n2]
#pragma unroll
      for (int block = 0; block < kTiles; ++block) {
        const Word4 f_re = table(Layout::kFirst, ((tile * kTiles + block) * 2) * 32 + lane);
        const Word4 f_im = table(Layout::kFirst, ((tile * kTiles + block) * 2 + 1) * 32 + lane);
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            multiply<f16>(y_re[s][c], f_re.v, x[s][block][c][0], x[s][block][c][1]);
            multiply<f16>(y_im[s][c], f_im.v, x[s][block][c][0], x[s][block][c][1]);
          }
      }
      uint32_t a_re[2][4], a_im[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Word4 twiddles = table(Layout::kInner, (tile * 32 + lane) * 2 + r);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const float(&re)[4] = y_re[s][c], (&im)[4] = y_im[s][c];
            const Pair z = times<false>(pair_of(re[2 * r], re[2 * r + 1], im[2 * r], im[2 * r + 1]),
                                        {twiddles.v[2 * c], twiddles.v[2 * c + 1]});
            a_re[s][2 * c + r] = z.re, a_im[s][2 * c + r] = z.im;
          }
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float z_re[2][4] = {}, z_im[2][4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          multiply<f16>(z_re[s], a_im[s], im.v[2 * c] ^ kSigns, im.v[2 * c + 1] ^ kSigns);
          multiply<f16>(z_re[s], a_re[s], re.v[2 * c], re.v[2 * c + 1]);
          multiply<f16>(z_im[s], a_re[s], im.v[2 * c], im.v[2 * c + 1]);
          multiply<f16>(z_im[s], a_im[s], re.v[2 * c], re.v[2 * c + 1]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = row_of(tile, r, c, e), i = 2 * r + e;
            put(mine + row, times<false>(pair_of(z_re[0][i], z_re[1][i], z_im[0][i], z_im[1][i]), get(twiddles + row)));
          }
      }
    }
    sync_threads();
  }

  // sums += x (16 x 32) times a third factor (32 x 32), in fragments: [16 numbers of a row][two tiles of 8].
  static SK_DEVICE void times_factor(float (&sums)[4][4], const uint32_t (&x)[2][4], const Word4 (&factor)[4]) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const Word4& f = factor[2 * block + n / 2];
        multiply<f16>(sums[n], x[block], f.v[n % 2 * 2], f.v[n % 2 * 2 + 1]);
      }
  }

  // The channel's spectrum from `part` to `part` + lag, 8 rows of the exchange: two places of k3, two of 8 + those.
  SK_DEVICE const Word4& spectrum(int64_t d, int lag, int m, int r) const {
    if constexpr (kParts == 1) return table(kStore, (2 * m + r) * 32 + lane);
    return reinterpret_cast<const Word4*>(a.spectrum)[(d * a.parts + lag) * (kN / 4) + (2 * m + r) * 32 + lane];
  }

  // Third factor, spectrum and inverse third factor of a warp's rows of the exchange, in place. Gives what results are
  // multiplied by. A barrier.
  SK_DEVICE float turn(int64_t d, int part) const {
    // Parts were divided by their own largest samples: their sum is by the largest of those up to this one.
    float largest = 0;
    for (int i = 0; kParts > 1 && i <= part; ++i) largest = fmaxf(largest, size(i));
    largest = largest == 0 ? 1.f : largest;
    uint32_t weights[kParts];
#pragma unroll
    for (int lag = 0; lag < kParts; ++lag) {
      const float weight = lag <= part && kParts > 1 ? size(part - lag) / largest : 1.f;
      weights[lag] = narrow_pair<f16>(weight, weight);
    }
    Word4 there[4], back[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) there[i] = fragment(4 + i), back[i] = fragment(8 + i);
#pragma unroll 1
    for (int m = warp * (kN1 / kWarps), end = m + kN1 / kWarps; m < end; ++m) {
      Word4 by[kParts][2];  // of a part behind others on its way from memory while the third factor is multiplied
#pragma unroll
      for (int lag = 0; lag < kParts; ++lag)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (kParts > 1 && lag <= part) by[lag][r] = spectrum(d, lag, m, r);
      uint32_t x[2][4];
#pragma unroll
      for (int block = 0; block < 2; ++block)
        load_matrices(x[block], work() + 256 * m + place(lane % 16, 2 * (2 * block + lane / 16)));
      float y[4][4] = {};  // re and im of k3 = 2 q and the next, then of 8 + those
      times_factor(y, x, there);
      uint32_t z[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kParts == 1) by[0][r] = spectrum(d, 0, m, r);
        Word4 mine;  // two of k3 and two of 8 + those: real parts, imaginary parts
#pragma unroll
        for (int i = 0; i < 4; ++i) mine.v[i] = narrow_pair<f16>(y[i][2 * r], y[i][2 * r + 1]);
        if (kParts > 1 && part + 1 < a.parts) store(part, m, r) = mine;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Pair own = pair_of(mine, j);
          Pair sum = times<false>(kParts > 1 ? weighed(own, weights[0]) : own, pair_of(by[0][r], j));
#pragma unroll
          for (int lag = 1; lag < kParts; ++lag)
            if (lag <= part) {
              const Pair before = weighed(pair_of(store(part - lag, m, r), j), weights[lag]);
              sum = plus_product(sum, before, pair_of(by[lag][r], j));
            }
          z[j][r] = sum.re, z[j][2 + r] = sum.im;
        }
      }
      float v[4][4] = {};
      times_factor(v, z, back);
      // All lanes have read what is written now: results of a product need the operands of all.
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = 8 * r + g, piece = 4 * half + q;
          const float(&re)[4] = v[2 * half], (&im)[4] = v[2 * half + 1];
          put(256 * m + place(row, piece),
              times<true>(pair_of(re[2 * r], re[2 * r + 1], im[2 * r], im[2 * r + 1]),
                          get(outer() + 256 * m + outer_place(row, piece))));
        }
    }
    sync_threads();
    return largest;
  }

  // What a lane keeps of a part's transform; nobody else reads it.
  SK_DEVICE Word4& store(int part, int m, int r) const {
    return reinterpret_cast<Word4*>(shared + kStore)[part * (kN / 4) + (2 * m + r) * 32 + lane];
  }

  // Inverse second and first factor, to `work` as `take_away` wants it. Two barriers.
  SK_DEVICE void inverse() const {
    const Word4 re = fragment(2), im = fragment(3);  // F2 conjugate, as a left operand
    uint32_t minus[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) minus[i] = im.v[i] ^ kSigns;
    const uint32_t* mine = work() + place(lane, warp);
    const uint32_t* inner = reinterpret_cast<const uint32_t*>(shared + Layout::kInnerBack) + lane * 8;
    float y[2][2 * kTiles][4] = {};  // [s][8 n1]; rows n2
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t a_re[2][4], a_im[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t x_re[2][2], x_im[2][2];  // [s][half of the k2]
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const Pair even = get(mine + row_of(tile, r, c, 0)), odd = get(mine + row_of(tile, r, c, 1));
          x_re[0][c] = lows(even.re, odd.re), x_re[1][c] = highs(even.re, odd.re);
          x_im[0][c] = lows(even.im, odd.im), x_im[1][c] = highs(even.im, odd.im);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          float z_re[4] = {}, z_im[4] = {};
          multiply<f16>(z_re, minus, x_im[s][0], x_im[s][1]);
          multiply<f16>(z_re, re.v, x_re[s][0], x_re[s][1]);
          multiply<f16>(z_im, re.v, x_im[s][0], x_im[s][1]);
          multiply<f16>(z_im, im.v, x_re[s][0], x_re[s][1]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Pair z = times<true>(
                pair_of(z_re[2 * half], z_re[2 * half + 1], z_im[2 * half], z_im[2 * half + 1]),
                get(inner + ((tile * 32 * 2 + half) * 2 + r) * 2));
            a_re[s][2 * r + half] = z.re, a_im[s][2 * r + half] = z.im;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n) {
        const Word4 f = table(Layout::kLast, (tile * 2 * kTiles + n) * 32 + lane);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          multiply<f16>(y[s][n], a_re[s], f.v[0], f.v[1]);
          multiply<f16>(y[s][n], a_im[s], f.v[2], f.v[3]);
        }
      }
    }
    sync_threads();
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Group<float, 2> two;
        two.words[0] = y[0][n][i], two.words[1] = y[1][n][i];
        const int n1 = 8 * n + 2 * q + i % 2, n2 = g + i / 2 * 8;
        two.store(reinterpret_cast<float*>(work()) + n1 * kOut1 + n2 * kOut2 + 2 * warp);
      }
    sync_threads();
  }

  SK_DEVICE void rows() const {
    const int share = int(block_index() / a.channels);
    const int64_t d = block_index() - int64_t(share) * a.channels;
    for (int i = thread_index() * 16; i < Layout::kFragments; i += kThreads * 16)
      copy_async(shared + i, reinterpret_cast<const unsigned char*>(a.tables) + i);
    for (int i = thread_index() * 16; kParts == 1 && i < kN * 4; i += kThreads * 16)
      copy_async(shared + kStore + i, reinterpret_cast<const unsigned char*>(a.spectrum + d * (2 * kN)) + i);
    copy_commit();
    copy_wait();
    const int first = share * a.turns * kTogether, end = first + a.turns * kTogether;
    for (int b = first; b < end && b < a.batch; b += kTogether)
#pragma unroll 1
      for (int part = 0; part < (kParts == 1 ? 1 : a.parts); ++part) {
        float scale[Base::kScales];
        bring(b, d, part, scale);  // its barriers are behind the copies as well
        forward();
        const float largest = turn(d, part);
        inverse();
#pragma unroll
        for (float& s : scale) s = (kParts == 1 ? s : largest) * a.scale[d];
        take_away(b, d, part, scale);
      }
  }

  static SK_DEVICE void run(const Args& a) { FusedConv{{a}}.rows(); }
};

}  // namespace scalekern::fft
