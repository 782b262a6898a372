// From tensors to the raw pointers that kernels take: dtype, current device and stream, layouts.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>

#include "dtype.h"

namespace fastast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      throw std::runtime_error("dtype must be float32, bfloat16 or float16");
  }
}

// The stream that torch uses on the tensor's device, which is the current one meanwhile.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// t, or a copy of it whose rows (the last dimension) can be read 16 bytes at a time.
inline Tensor in_packs(const Tensor& t) {
  const int64_t pack = 16 / static_cast<int64_t>(t.element_size());
  const int64_t last = t.dim() - 1;
  bool aligned = t.stride(last) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && t.stride(i) % pack == 0;
  return aligned ? t : torch::stable::contiguous(t);
}

}  // namespace fastast
