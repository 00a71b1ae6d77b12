// Evaluates a mask's program on a block of 64 queries x 64 keys: a word of 64 bits a query.
//
// Every leaf has a natural orientation, rows x and bits y (for most, the bits of a row are an interval: two shifts);
// where x plays key, the block is transposed. AND, OR and NOT work word by word.
// Coordinates may leave the sequences: leaves answer there, and no table is read out of its range.
#pragma once
#include <cstdint>

namespace {

constexpr int kMaskBlock = 64;
using MaskWord = uint64_t;

enum MaskOp : int32_t {
  kMaskAll, kMaskCausal, kMaskWindow, kMaskBelow, kMaskPrefix, kMaskBlocks, kMaskSame, kMaskDilated, kMaskNeighbor,
  kMaskDense, kMaskRows, kMaskAnd = 16, kMaskOr, kMaskNot
};

constexpr int64_t kMaskFar = int64_t(1) << 40;  // beyond any position

static inline int64_t mask_clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Bits below n, 0 <= n <= 64.
static inline MaskWord low_bits(int64_t n) { return n == 0 ? 0 : ~MaskWord(0) >> (64 - n); }

// Bits of the positions [first, last) among [base, base + 64).
static inline MaskWord interval_bits(int64_t first, int64_t last, int64_t base) {
  const int64_t low = mask_clamp(first - base, 0, 64), high = mask_clamp(last - base, low, 64);
  return low_bits(high) & ~low_bits(low);
}

// In place: bit c of word r <-> bit r of word c, by halves, quarters and so on.
static void transpose_bits(MaskWord* w) {
  MaskWord keep = 0x00000000ffffffffull;
  for (int half = 32; half > 0; half >>= 1, keep ^= keep << half)
    for (int base = 0; base < 64; base += 2 * half)
      for (int i = base; i < base + half; ++i) {
        const MaskWord swapped = ((w[i] >> half) ^ w[i + half]) & keep;
        w[i] ^= swapped << half;
        w[i + half] ^= swapped;
      }
}

// The keys [start, end) in units of the dilation that a query sees along one axis, and their residue.
struct NeighborAxis {
  int64_t start, end, residue;
  NeighborAxis(int64_t x, int64_t size, int64_t kernel, int64_t dilation) : residue(x % dilation) {
    const int64_t n = (size - residue + dilation - 1) / dilation;
    start = mask_clamp(x / dilation - kernel / 2, 0, n > kernel ? n - kernel : 0);
    end = start + kernel < n ? start + kernel : n;
  }
};

static MaskWord neighbor_bits(const int32_t* p, int64_t x, int64_t y0) {
  const int64_t rows = p[0], columns = p[1];
  if (x < 0 || x >= rows * columns) return 0;
  const NeighborAxis down(x / columns, rows, p[2], p[4]), across(x % columns, columns, p[3], p[5]);
  MaskWord word = 0;
  for (int64_t i = down.start; i < down.end; ++i) {
    const int64_t base = (i * p[4] + down.residue) * columns;
    if (base + columns <= y0 || base >= y0 + 64) continue;
    if (p[5] == 1) {
      word |= interval_bits(base + across.start, base + across.end, y0);
      continue;
    }
    for (int64_t j = across.start; j < across.end; ++j) {
      const int64_t at = base + j * p[5] + across.residue - y0;
      if (at >= 0 && at < 64) word |= MaskWord(1) << at;
    }
  }
  return word;
}

// Bits [y0, y0 + 64) of a row of `count` cells, 32 a table entry, each `width` positions wide.
static MaskWord dense_bits(const int32_t* row, int64_t count, int64_t width, int64_t y0) {
  const int64_t begin = y0 > 0 ? y0 : 0, end = y0 + 64 < count * width ? y0 + 64 : count * width;
  if (begin >= end) return 0;
  MaskWord word = 0;
  if (width == 1) {
    for (int64_t i = begin / 32; i * 32 < end; ++i) {
      const MaskWord part = uint32_t(row[i]);
      const int64_t at = i * 32 - y0;
      word |= at >= 0 ? part << at : part >> -at;
    }
    return word & interval_bits(begin, end, y0);
  }
  for (int64_t cell = begin / width; cell * width < end; ++cell)
    if (uint32_t(row[cell / 32]) >> (cell % 32) & 1) word |= interval_bits(cell * width, (cell + 1) * width, y0);
  return word;
}

static MaskWord equal_bits(const int32_t* ids, int64_t count, int32_t id, int64_t y0) {
  const int64_t begin = y0 > 0 ? y0 : 0, end = y0 + 64 < count ? y0 + 64 : count;
  MaskWord word = 0;
  for (int64_t y = begin; y < end; ++y) word |= MaskWord(ids[y] == id) << (y - y0);
  return word;
}

// One leaf: row r of `rows` is x0 + r, bit c is y0 + c.
static void mask_leaf(const int32_t* code, const int32_t* in, int64_t b, int64_t h, int64_t x0, int64_t y0, int rows,
                      MaskWord* to) {
  const int32_t* p = in + 4;
  const auto fill = [&](const auto& row) {
    for (int r = 0; r < rows; ++r) to[r] = row(x0 + r);
  };
  const auto batch = [&](int32_t n) { return n == 1 ? int64_t(0) : b; };
  switch (in[0]) {
    case kMaskAll: return fill([](int64_t) { return ~MaskWord(0); });
    case kMaskCausal: return fill([&](int64_t x) { return interval_bits(-kMaskFar, x + 1, y0); });
    case kMaskWindow: {
      const int64_t left = p[0] < 0 ? kMaskFar : p[0], right = p[1] < 0 ? kMaskFar : p[1];
      return fill([&](int64_t x) { return interval_bits(x - left, x + right + 1, y0); });
    }
    case kMaskBelow: {
      const MaskWord word = interval_bits(0, p[0], y0);
      return fill([&](int64_t) { return word; });
    }
    case kMaskPrefix: {
      const MaskWord word = interval_bits(0, code[p[0] + batch(p[1])], y0);
      return fill([&](int64_t) { return word; });
    }
    case kMaskBlocks:
      return fill([&](int64_t x) {
        return x < 0 ? 0 : interval_bits(0, code[p[0] + mask_clamp(x, 0, p[1] - 1)], y0);
      });
    case kMaskSame: {
      const int32_t *of_x = code + p[0] + batch(p[4]) * p[1], *of_y = code + p[2] + batch(p[4]) * p[3];
      int32_t last = -1;
      MaskWord word = 0;  // of the last id: neighbours mostly share it
      return fill([&](int64_t x) {
        const int32_t id = x >= 0 && x < p[1] ? of_x[x] : -1;
        if (id != last) word = id < 0 ? 0 : equal_bits(of_y, p[3], id, y0);
        last = id;
        return word;
      });
    }
    case kMaskDilated: {
      const int64_t step = p[0];
      MaskWord comb = 0;
      for (int64_t i = 0; i < 64; i += step) comb |= MaskWord(1) << i;
      return fill([&](int64_t x) {
        const int64_t distance = (x - y0) % step, first = distance < 0 ? distance + step : distance;
        return first < 64 ? comb << first : 0;
      });
    }
    case kMaskNeighbor: return fill([&](int64_t x) { return neighbor_bits(p, x, y0); });
    case kMaskDense: {
      const int64_t words = (int64_t(p[2]) + 31) / 32;
      const int32_t* table = code + p[0] + (batch(p[3]) * p[4] + (p[4] == 1 ? 0 : h)) * p[1] * words;
      return fill([&](int64_t x) {
        return x < 0 || x / p[5] >= p[1] ? 0 : dense_bits(table + x / p[5] * words, p[2], p[6], y0);
      });
    }
    case kMaskRows: {
      const int32_t* flags = code + p[0] + batch(p[2]) * p[1];
      return fill([&](int64_t x) { return x >= 0 && x < p[1] && flags[x] ? ~MaskWord(0) : 0; });
    }
    default: return fill([](int64_t) { return MaskWord(0); });
  }
}

// stack: 64 words for every leaf that is pushed at a time. Leaves the block in stack[0 .. 64): word r is query q0 + r,
// bit c is key k0 + c; the first `rows` of them where no more are asked for.
static void evaluate_mask(const int32_t* code, int64_t b, int64_t h, int64_t q0, int64_t k0, MaskWord* stack,
                          int rows = kMaskBlock) {
  const int32_t* program = code + code[2 + (code[0] == 1 ? 0 : h)];
  const int32_t* in = program + 2;
  MaskWord* top = stack;  // one past the last block
  for (int32_t i = 0; i < program[0]; ++i, in += 12) {
    MaskWord *last = top - kMaskBlock, *before = last - kMaskBlock;
    switch (in[0]) {
      case kMaskAnd:
        for (int r = 0; r < rows; ++r) before[r] &= last[r];
        top = last;
        break;
      case kMaskOr:
        for (int r = 0; r < rows; ++r) before[r] |= last[r];
        top = last;
        break;
      case kMaskNot:
        for (int r = 0; r < rows; ++r) last[r] = ~last[r];
        break;
      default:
        mask_leaf(code, in, b, h, (in[1] ? k0 : q0) + in[2], (in[1] ? q0 : k0) + in[3],
                  in[1] ? kMaskBlock : rows, top);
        if (in[1]) transpose_bits(top);
        top += kMaskBlock;
    }
  }
}

}  // namespace
