// dx = dout w for a low-bit weight: on tile registers (cpu_quant_bwd_tiles.h), or as floats: blocks of it (kBlockRows x
// kBlockColumns) are decoded into L2, as they lie, for all tokens. Threads share the columns, so that each sum over rows
// has one order, whatever their number.
#include "common/micro_gemm.h"
#include "quant_matmul/cpu_quant_bwd_tiles.h"

namespace {

using scalekern::QuantMatmulBwdArgs;

constexpr int64_t kBlockRows = 128, kBlockColumns = 256, kBlockTokens = 256;

static void block_of_columns(
    const QuantMatmulBwdArgs& a, const float* dout, int64_t pitch, int64_t first, float* block, float* c,
    float* parts) {
  const QuantWeight& w = a.w;
  constexpr int64_t kPanelColumns = kPanel<float>;
  const int64_t count = least(kBlockColumns, w.columns - first), padded = round_up(count, kPanelColumns);
  for (int64_t m = 0; m < a.tokens; m += kBlockTokens) {
    const int64_t tokens = least(kBlockTokens, a.tokens - m);
    zero(c, tokens * kBlockColumns);
    for (int64_t n = 0; n < w.rows; n += kBlockRows) {
      const int64_t rows = least(kBlockRows, w.rows - n);
      for (int64_t r = 0; r < rows; ++r) {
        const GroupParts part(parts, w.groups);
        part.load(w, n + r);
        decode(w, n + r, part, first, count, block + r * kBlockColumns);
      }
      for (int64_t r = 0; padded > count && r < rows; ++r) zero(block + r * kBlockColumns + count, padded - count);
      for (int64_t k = 0; k < padded; k += kPanelColumns)
        panel_gemm<float, false, true>(
            tokens, dout + m * pitch + n, pitch, block + k, kBlockColumns, rows, c + k, kBlockColumns);
    }
    for (int64_t t = 0; t < tokens; ++t)
      store_row(a.dx, m + t, first, count, c + t * kBlockColumns);
  }
}

static void as_floats(const QuantMatmulBwdArgs& a) {
  const QuantWeight& w = a.w;
  const bool in_place = a.dout.dtype == QuantDtype::f32 && (a.dout.column == 1 || w.rows == 1);
  const Buffer<float> own(in_place ? 0 : a.tokens * w.rows);
  for (int64_t m = 0; !in_place && m < a.tokens; ++m) load_row(a.dout, m, w.rows, own + m * w.rows);
  const float* dout = in_place ? static_cast<const float*>(a.dout.data) : own;
  const int64_t pitch = in_place ? a.dout.row : w.rows;
  parallel_if(
      a.tokens * w.rows * w.columns >= kParallelWork, pieces(w.columns, kBlockColumns),
      [&](int64_t begin, int64_t end) {
        const Buffer<float> block(kBlockRows * kBlockColumns + 8), parts(GroupParts::floats(w.groups));
        const Buffer<float> c(least(a.tokens, kBlockTokens) * kBlockColumns);
        for (int64_t i = begin; i < end; ++i)
          block_of_columns(a, dout, pitch, i * kBlockColumns, block, c, parts);
      });
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void quant_matmul_bwd(const QuantMatmulBwdArgs& a) {
#if defined(__AVX512F__)
  if (BackwardTiles::is_faster(a)) return BackwardTiles(a).run(as_floats);
#endif
  as_floats(a);
}

}  // namespace scalekern::SCALEKERN_ISA
