// The mean of the keys over heads at unit length: k [B, H, N, D] (strided, last dimension dense)
// -> fp32 [B, N, D]. One warp a token: it reads H D values, keeps their sum over heads in
// registers, and writes D floats. Bytes: B N D (H sizeof(T) + 4), no shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>

#include "../match.h"

namespace fastast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kMaxPerLane = 8;  // head dimensions up to 256

struct Params {
  const void* k;
  float* out;
  int64_t tokens;  // B N
  int64_t n, heads, d;
  int64_t batch_stride, head_stride, row_stride;  // in elements
};

// torch's build flags switch the implicit conversions off.
__device__ inline double value_of(double v) { return v; }
__device__ inline float value_of(float v) { return v; }
__device__ inline float value_of(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float value_of(__half v) { return __half2float(v); }

template <class T, class A>
__global__ void key_metric_kernel(Params p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const int lane = threadIdx.x % kWarp;
  const T* k =
      static_cast<const T*>(p.k) + token / p.n * p.batch_stride + token % p.n * p.row_stride;
  A sum[kMaxPerLane];
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) sum[i] = 0;
  for (int64_t h = 0; h < p.heads; ++h) {
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) {
      const int64_t c = lane + i * kWarp;
      if (c < p.d) sum[i] += value_of(k[h * p.head_stride + c]);
    }
  }
  A square = 0;
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) {
    sum[i] /= static_cast<A>(p.heads);
    square += sum[i] * sum[i];
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    square += __shfl_xor_sync(0xffffffffu, square, offset);
  const A norm = sqrt(square);
  const A inverse = A(1) / (norm < A(1e-12) ? A(1e-12) : norm);
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) {
    const int64_t c = lane + i * kWarp;
    if (c < p.d) p.out[token * p.d + c] = static_cast<float>(sum[i] * inverse);
  }
}

template <class T, class A>
void launch(const Params& p, cudaStream_t stream) {
  const int64_t blocks = (p.tokens + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks == 0) return;
  key_metric_kernel<T, A><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("key_metric: ") + cudaGetErrorString(error));
}

}  // namespace

Tensor key_metric_cuda(const Tensor& k_) {
  const Tensor k = k_.stride(3) == 1 ? k_ : torch::stable::contiguous(k_);
  if (k.size(3) > kWarp * kMaxPerLane)
    throw std::runtime_error("k must have a head dimension of at most 256, got " +
                             std::to_string(k.size(3)));
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(k.get_device_index(), &stream));
  Tensor out = torch::stable::new_empty(k, {k.size(0), k.size(2), k.size(3)}, ScalarType::Float);
  const Params p{k.const_data_ptr(),
                 static_cast<float*>(out.mutable_data_ptr()),
                 k.size(0) * k.size(2),
                 k.size(2),
                 k.size(1),
                 k.size(3),
                 k.stride(0),
                 k.stride(1),
                 k.stride(2)};
  const auto s = static_cast<cudaStream_t>(stream);
  switch (k.scalar_type()) {
    case ScalarType::Double:
      launch<double, double>(p, s);
      break;
    case ScalarType::Float:
      launch<float, float>(p, s);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16, float>(p, s);
      break;
    case ScalarType::Half:
      launch<__half, float>(p, s);
      break;
    default:
      throw std::runtime_error("k must be float64, float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace fastast
