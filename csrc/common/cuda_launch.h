// Launches kernels from ops of the stable ABI: device guard, torch's current stream, scratch from torch's allocator.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <vector>

#include "common/tensor.h"
#include "common/view.h"

namespace scalekern {

inline View view(const Tensor& t) {
  View v;
  v.data = t.data_ptr(), v.dims = int(t.dim()), v.dtype = int(dtype_of(t));
  for (int i = 0; i < v.dims && i < 4; ++i) v.size[i] = t.size(i), v.stride[i] = t.stride(i);
  return v;
}

inline View view(const OptionalTensor& t) { return t.has_value() ? view(*t) : View{}; }

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "scalekern: ", what, ": ", cudaGetErrorString(status));
}

// torch's current stream. Its accessor lives in libtorch_cuda, which a CPU-only torch does not have: it is looked up at
// the first call, so that this library links against, and loads into, either.
inline cudaStream_t current_stream(int32_t device) {
  using Accessor = AOTITorchError (*)(int32_t, void**);
  static const Accessor accessor = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    void* library = found ? nullptr : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Accessor>(library ? dlsym(library, name) : found);
  }();
  STD_TORCH_CHECK(accessor != nullptr, "scalekern: this torch has no CUDA support (libtorch_cuda is not loaded)");
  void* stream = nullptr;
  STD_TORCH_CHECK(accessor(device, &stream) == 0, "scalekern: torch's current stream of device ", device);
  return static_cast<cudaStream_t>(stream);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Args args) {
  Kernel::run(args);
}

// One op call on the device of `like`.
class Exec {
 public:
  explicit Exec(const Tensor& like)
      : like_(like), device_(like.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

  int processors() const {
    static const int count = [&] {
      int n = 0;
      check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device_), "device attribute");
      return n;
    }();
    return count;
  }

  // Uninitialized device memory, until the op returns (stream-ordered: torch's caching allocator).
  void* scratch(int64_t bytes) {
    using torch::headeronly::ScalarType;
    kept_.push_back(torch::stable::new_empty(like_, std::initializer_list<int64_t>{bytes}, ScalarType::Byte));
    return kept_.back().data_ptr();
  }

  template <class Kernel>
  void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Args& args) {
    if (blocks <= 0) return;
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "scalekern: ", blocks, " blocks are more than a grid holds");
    if (shared_bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
            "shared memory of a block");
      check(cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 int(cudaSharedmemCarveoutMaxShared)),
            "shared memory of an SM");
    }
    kernel_entry<Kernel><<<dim3(unsigned(blocks)), Kernel::kThreads, size_t(shared_bytes), stream_>>>(args);
    check(cudaGetLastError(), "launch");
  }

 private:
  Tensor like_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  std::vector<Tensor> kept_;
};

}  // namespace scalekern
