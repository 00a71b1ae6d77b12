// A tensor as pointer, sizes and strides: what the drivers of the CUDA kernels take, whether they launch on a GPU
// (cuda_launch.h) or in the host emulator (bind_cuda_emulator.h). An absent optional tensor has no data and `dims` 0.
#pragma once
#include <cstdint>

namespace scalekern {

struct View {
  void* data = nullptr;
  int dims = 0;
  int dtype = 0;  // enum Dtype of common/tensor.h: f32, f64, f16, bf16, i32, i64
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
  explicit operator bool() const { return dims != 0; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

}  // namespace scalekern
