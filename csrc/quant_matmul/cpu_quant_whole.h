// Both sides of an integer product as it reads them: activations rounded to whole numbers, and rows of codes.
#pragma once
#include "quant_matmul/cpu_quant_tokens.h"

namespace {

constexpr int64_t kLaneGroup = 1024;   // 255 x 127 x 1024 / 8 < 2^24, and so is zero times the sum of activations
constexpr int64_t kRunColumns = 1 << 18;  // 255 x 127 x 2^18 / 8 < 2^31
constexpr int64_t kLaneBytes = 32;

// Where codes and activations lie: groups of `blocks` blocks, each of kLaneBytes codes x planes (16 codes of 8 bits).
struct Layout {
  int planes;
  bool direct;           // rows are read as they are stored
  int64_t unit;          // columns of a block
  int64_t group_blocks;  // of a full group
  int64_t blocks;        // of a row
  int64_t pairs;         // blocks between two widenings of the int16 sums
  float middle;          // of the codes: what zeros are near to
  bool brief;            // a group's sums fit in int16: they begin with -middle times the activations'

  explicit Layout(const QuantWeight& w) {
#if defined(__AVX2__)
    planes = w.bits == 8 ? 1 : 8 % w.bits == 0 ? 8 / w.bits : 1;
    direct = 8 % w.bits == 0 && (w.groups == 1 || w.group % (w.bits == 8 ? 16 : kLaneBytes * planes) == 0);
    if (!direct) planes = 1;
#else
    planes = 1, direct = false;
#endif
    unit = w.bits == 8 ? 16 : kLaneBytes * planes;
    middle = float(1 << w.bits >> 1);
    group_blocks = pieces(least(w.group, w.columns), unit);
    const int64_t last = w.columns - (w.groups - 1) * w.group;
    blocks = (w.groups - 1) * group_blocks + pieces(last, unit);
    pairs = most(1, 32767 / (2 * 127 * ((1 << w.bits) - 1)) / planes);
#if defined(__AVX2__)
    brief = w.bits < 8 && w.groups > 1 && w.group <= kLaneGroup && group_blocks <= pairs;
#else
    brief = false;
#endif
  }
  int64_t begin(int64_t g) const { return g * group_blocks; }
  int64_t end(const QuantWeight& w, int64_t g) const { return g + 1 < w.groups ? begin(g + 1) : blocks; }
  int64_t row_bytes() const { return blocks * (unit / planes); }
};

// Tokens as whole numbers: int8, or int16 beside 8-bit codes; their scales, and their sums over groups.
template <class X>
struct Whole {
  int64_t pitch, groups;  // a line more than a row: rows a power of two apart would share the sets of L1
  Buffer<X> x;
  Buffer<float> scale, sum;
  Buffer<float> middle;  // the middle code times a group's sum in each of 8 lanes; brief: its negative in 16 of int16
  Buffer<int64_t> exact_sum;

  Whole(const QuantMatmulArgs& a, const Layout& layout)
      : pitch(layout.blocks * layout.unit + 64 / int64_t(sizeof(X))), groups(a.w.groups), x(a.tokens * pitch),
        scale(a.tokens), sum(a.tokens * groups + 8), middle(a.tokens * groups * 8), exact_sum(a.tokens * groups) {
    const QuantWeight& w = a.w;
    const int64_t K = w.columns;
    zero(sum + a.tokens * groups, 8);
    parallel_if(a.tokens * K >= kParallelWork, a.tokens, [&](int64_t begin, int64_t end) {
      const Buffer<float> own(K);
      const Buffer<X> plain(K);
      for (int64_t m = begin; m < end; ++m) {
        const float* token = own;
        if (a.x.dtype == QuantDtype::f32 && a.x.column == 1) token = at<float>(a.x.data, m * a.x.row);
        else load_row(a.x, m, K, own);
        scale[m] = scale_of_token(token, K, a.activation_max, a.activation_scale);
        round_to_whole(token, K, scale[m], a.activation_max, own);
        for (int64_t k = 0; k < K; ++k) plain[k] = X(int(own[k]));
        X* dst = x + m * pitch;
        __builtin_memset(dst, 0, size_t(pitch) * sizeof(X));
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t first = g * w.group, count = least(w.group, K - first);
          int64_t total = 0;
          for (int64_t k = first; k < first + count; ++k) total += plain[k];
          exact_sum[m * groups + g] = total, sum[m * groups + g] = float(total);
          X* group = dst + layout.begin(g) * layout.unit;
          place(group, plain + first, count, layout);
          float* lanes = middle + (m * groups + g) * 8;
          if (layout.brief) minus_in_pairs(group, round_up(count, layout.unit), int(layout.middle), lanes);
          else sum_in_lanes(group, round_up(count, layout.unit), layout.middle, lanes);
        }
      }
    });
  }

  // As the products of a block fall into the 8 lanes of int32, 32 bytes of activations at a time.
  static void sum_in_lanes(const X* x, int64_t count, float middle, float* lanes) {
    int32_t sums[8] = {};
    constexpr int64_t kVector = kLaneBytes / int64_t(sizeof(X)), kEach = kVector / 8;
    for (int64_t k = 0; k < count; k += kVector)
      for (int64_t i = 0; i < kVector; ++i) sums[i / kEach] += x[k + i];
    for (int i = 0; i < 8; ++i) lanes[i] = float(sums[i]) * middle;
  }

  static void minus_in_pairs(const X* x, int64_t count, int middle, void* lanes) {
    int16_t sums[16] = {};
    for (int64_t k = 0; k < count; k += kLaneBytes)
      for (int i = 0; i < 16; ++i) sums[i] = int16_t(sums[i] - middle * (x[k + 2 * i] + x[k + 2 * i + 1]));
    __builtin_memcpy(lanes, sums, sizeof sums);
  }

  static void place(X* dst, const X* src, int64_t count, const Layout& layout) {
    switch (layout.planes) {
      case 1: return void(__builtin_memcpy(dst, src, size_t(count) * sizeof(X)));
      case 2: return place<2>(dst, src, count);
      case 4: return place<4>(dst, src, count);
      case 8: return place<8>(dst, src, count);
    }
  }
  template <int P>
  static void place(X* dst, const X* src, int64_t count) {
    int64_t k = 0;
    for (; k + P * kLaneBytes <= count; k += P * kLaneBytes)
      for (int p = 0; p < P; ++p)
        for (int i = 0; i < kLaneBytes; ++i) dst[k + p * kLaneBytes + i] = src[k + i * P + p];
    for (int64_t i = k; i < count; ++i) dst[k + (i - k) % P * kLaneBytes + (i - k) / P] = src[i];
  }
};

// Rows of codes in the layout: where they are, or copied and unpacked.
class CodeRows {
 public:
  CodeRows(const QuantWeight& w, const Layout& layout, int64_t rows)
      : w_(w), layout_(layout), in_place_(layout.direct && w.row_bytes() == layout.row_bytes()),
        own_(in_place_ ? 0 : rows * layout.row_bytes()), plain_(layout.direct ? 0 : w.columns + 8) {}

  void load(int64_t first, int64_t rows) {
    first_ = first;
    for (int64_t r = 0; !in_place_ && r < rows; ++r) {
      uint8_t* dst = own_ + r * layout_.row_bytes();
      if (layout_.direct) {
        __builtin_memcpy(dst, w_.data + (first + r) * w_.pitch, size_t(w_.row_bytes()));
        __builtin_memset(dst + w_.row_bytes(), 0, size_t(layout_.row_bytes() - w_.row_bytes()));
        continue;
      }
      unpack(w_, first + r, plain_);
      __builtin_memset(dst, 0, size_t(layout_.row_bytes()));
      for (int64_t g = 0; g < w_.groups; ++g)
        __builtin_memcpy(dst + layout_.begin(g) * layout_.unit, plain_ + g * w_.group,
                         size_t(least(w_.group, w_.columns - g * w_.group)));
    }
  }
  const uint8_t* operator[](int64_t r) const {
    return in_place_ ? w_.data + (first_ + r) * w_.pitch : own_ + r * layout_.row_bytes();
  }

 private:
  const QuantWeight& w_;
  const Layout& layout_;
  bool in_place_;
  Buffer<uint8_t> own_, plain_;
  int64_t first_ = 0;
};

// A row's parts, and what they leave beside scale (sum - middle sum x): rest sum x, eight groups at a time.
struct RowParts : GroupParts {
  float* rest;

  static int64_t floats(int64_t groups) { return GroupParts::floats(groups) + round_up(groups, 8); }
  RowParts() = default;
  RowParts(const QuantWeight& w, int64_t row, float middle, float* memory)
      : GroupParts(memory, w.groups), rest(memory + GroupParts::floats(w.groups)) {
    load(w, row);
    if (!w.has_rest(middle)) return;
    ::zero(rest, round_up(w.groups, 8));
    for (int64_t g = 0; g < w.groups; ++g) rest[g] = offset[g] - scale[g] * (zero[g] - middle);
  }
};

// The parts of a product of R rows and T tokens that do not depend on how its integers are multiplied.
template <class X>
struct Problem {
  const QuantWeight& w;
  const Layout& layout;
  const Whole<X>& tokens;
};

// scale (sum - zero sum x) + offset sum x, the difference in double, which holds it.
template <class X>
static inline float grouped(const Problem<X>& p, const GroupParts& part, int64_t t, int64_t g, int64_t sum) {
  const int64_t i = t * p.w.groups + g;
  const double difference = double(sum) - double(part.zero[g]) * double(p.tokens.exact_sum[i]);
  const float value = part.scale[g] * float(difference);
  return p.w.offsets.data ? value + part.offset[g] * p.tokens.sum[i] : value;
}

}  // namespace
