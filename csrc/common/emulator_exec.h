// The Exec of a driver (cuda_launch.h) for the host emulator, and views of tensors that come from Python as tuples.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/emulator.h"
#include "common/view.h"

namespace scalekern::emulator {

// (address, dtype code, sizes, strides); None stands for an absent one.
using TensorTuple = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>;
using Tensors = std::vector<std::optional<TensorTuple>>;

inline View view(const std::optional<TensorTuple>& t) {
  View v;
  if (!t) return v;
  const auto& [address, dtype, sizes, strides] = *t;
  v.data = reinterpret_cast<void*>(address), v.dtype = dtype, v.dims = int(sizes.size());
  for (int i = 0; i < v.dims; ++i) v.size[i] = sizes[i], v.stride[i] = strides[i];
  return v;
}

// Names of kernels that launched, since they were last asked for.
inline std::vector<std::string>& launched() {
  static std::vector<std::string> names;
  return names;
}

// Dynamic shared memory of the kernel that was launched last.
inline int64_t& shared_of_last() {
  static int64_t bytes = 0;
  return bytes;
}

class HostExec {
 public:
  HostExec(int processors, int order) : processors_(processors) { block().order = Order(order); }

  int processors() const { return processors_; }

  void* scratch(int64_t bytes) {  // poisoned: NaN in every type
    kept_.emplace_back(new (std::align_val_t(16)) unsigned char[size_t(bytes)]);
    std::memset(kept_.back().get(), 0xff, size_t(bytes));
    return kept_.back().get();
  }

  template <class Kernel>
  void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Args& args) {
    int64_t most = 163;  // of a block on sm_80
    if constexpr (requires { Kernel::kMostShared; }) most = Kernel::kMostShared;
    if (shared_bytes > most * 1024) throw std::runtime_error("more shared memory than a block has on the GPU");
    shared_of_last() = shared_bytes;
    launched().push_back(pybind11::type_id<Kernel>());
    block().template launch<Kernel>(blocks, shared_bytes, args);
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(16)); }
  };
  int processors_;
  std::vector<std::unique_ptr<unsigned char, Free>> kept_;
};

}  // namespace scalekern::emulator
