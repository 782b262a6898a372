// What the CPU ops share: dtype dispatch, dense inputs, scratch memory, and splitting rows over
// torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type_of = std::is_same_v<T, double>  ? ScalarType::Double
                                      : std::is_same_v<T, float> ? ScalarType::Float
                                      : std::is_same_v<T, bf16>  ? ScalarType::BFloat16
                                                                 : ScalarType::Half;

// f(T{}) for the kernel type of a floating dtype.
template <class F>
auto dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(f16{});
    default:
      throw std::runtime_error("dtype must be float64, float32, bfloat16 or float16");
  }
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Dense in the last dimension.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) < 2 ? t : torch::stable::contiguous(t);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Uninitialised, on the device of `like` and of its dtype unless there is another. Takes half as
// long as asking the dispatcher for new_empty, which shows where a call has few tokens.
inline Tensor empty_strided(const Tensor& like, Sizes sizes, Sizes strides,
                            std::optional<ScalarType> dtype = std::nullopt) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto of = torch::stable::detail::from(dtype ? *dtype : like.scalar_type());
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(of), device_type, device_index, &tensor));
  return Tensor(tensor);
}

inline std::vector<int64_t> dense_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return strides;
}

inline Tensor empty(const Tensor& like, Sizes sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return empty_strided(like, sizes, dense_strides(sizes), dtype);
}

// Other sizes and strides of the same memory.
inline Tensor view(const Tensor& t, Sizes sizes, Sizes strides, int64_t offset) {
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), offset, &tensor));
  return Tensor(tensor);
}

// What a linear layer may read: many rows of fp32 are multiplied faster by eights (PackedLinear),
// so there is memory for whole eights, cleared beyond the last row: products of what was there
// before could be of subnormal numbers.
inline Tensor empty_rows(const Tensor& like, int64_t rows, int64_t row, Sizes sizes,
                         Sizes strides) {
  constexpr int64_t kMany = 512, kGroup = 8;
  if (rows < kMany || rows % kGroup == 0 || like.scalar_type() != ScalarType::Float)
    return empty_strided(like, sizes, strides);
  const int64_t spare = (kGroup - rows % kGroup) * row;
  const Tensor flat = empty(like, {rows * row + spare});
  std::fill_n(mutable_data<float>(flat) + rows * row, spare, 0.0f);
  return view(flat, sizes, strides, 0);
}

// [B, H, N, D] as a view of [B, N, H, D].
inline Tensor heads_like(const Tensor& t) {
  const int64_t batch = t.size(0), heads = t.size(1), n = t.size(2), d = t.size(3);
  return empty_rows(t, batch * n, heads * d, {batch, heads, n, d},
                    {n * heads * d, d, heads * d, 1});
}

// The dense form of an optional tensor, kept alive here, and its data or null.
struct OptionalSize {
  explicit OptionalSize(const std::optional<Tensor>& size) {
    if (size.has_value()) tensor = dense(*size);
  }
  const float* row(int64_t first) const {
    return tensor ? static_cast<const float*>(tensor->const_data_ptr()) + first : nullptr;
  }
  std::optional<Tensor> tensor;
};

// Uninitialised memory on a cache line of its own, so that no vector load straddles two.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<A*>(::operator new(std::max<int64_t>(n, 1) * sizeof(A), kLine))) {}
  ~Scratch() { ::operator delete(data_, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  A* data_;
};

// Rows per thread below which starting a thread costs more than it saves.
inline int64_t grain(int64_t d) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(d, 1)); }

// f(sample, begin, end) over `rows` rows of each of `batch` samples, in parallel.
template <class F>
void parallel_rows(int64_t batch, int64_t rows, int64_t d, const F& f) {
  torch::stable::parallel_for(0, batch * rows, grain(d), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / rows;
      const int64_t stop = std::min(end, (sample + 1) * rows);
      f(sample, begin - sample * rows, stop - sample * rows);
      begin = stop;
    }
  });
}

// The inverse of an assignment [B, N]: for each sample, the tokens of every row, ascending.
class Inverse {
 public:
  Inverse(const Tensor& assignment, int64_t n_out);
  // Whether some token has no row.
  bool drops() const { return dropped_; }
  Sources operator[](int64_t sample) const {
    return {offsets_.data() + sample * (n_out_ + 1), tokens_.data() + sample * n_};
  }

 private:
  int64_t n_, n_out_;
  bool dropped_ = false;
  std::vector<int32_t> offsets_, tokens_;
};

}  // namespace fastast
