// The row kernels of rows.h: a warp a row, four rows a block.
#include <stdexcept>
#include <string>

#include "rows.h"
#include "width.h"

namespace fastast {
namespace {

constexpr int kWarpsPerBlock = 4;

FASTAST_DEVICE int64_t row_of_this_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    reduce_rows_kernel(const ReduceRows p, int64_t rows) {
  const int64_t row = row_of_this_warp();
  Warp<RowLane<kPerLane>> warp;
  if (row < rows) reduce_row<T>(warp, p, row);
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    gather_rows_kernel(const GatherRows p, int64_t rows) {
  const int64_t row = row_of_this_warp();
  Warp<RowLane<kPerLane>> warp;
  if (row < rows) gather_row<T>(warp, p, row);
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    add_norm_rows_kernel(const AddNormRows p, int64_t rows) {
  const int64_t row = row_of_this_warp();
  Warp<RowLane<kPerLane>> warp;
  if (row < rows) add_norm_row<T>(warp, p, row);
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarp) norm_grad_runs_kernel(const NormGradRuns p) {
  extern __shared__ float sums[];
  Warp<RowLane<kPerLane>> warp;
  norm_grad_run<T>(warp, p, blockIdx.x, sums);
}

template <class F>
void with_type(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat) f(float());
  if (dtype == Dtype::kBFloat16) f(BFloat16());
  if (dtype == Dtype::kHalf) f(Half());
}

unsigned blocks_for(int64_t rows) {
  const int64_t blocks = (rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks > 0x7fffffff) throw std::runtime_error("too many rows for one launch");
  return static_cast<unsigned>(blocks);
}

void check(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace

#define FASTAST_LAUNCH(kernel, p, rows, dtype, stream)                                       \
  if ((rows) == 0) return;                                                                   \
  with_values_per_lane((p).d, [&](auto values) {                                             \
    with_type(dtype, [&](auto type) {                                                        \
      kernel<decltype(type), values()>                                                       \
          <<<blocks_for(rows), kWarpsPerBlock * kWarp, 0, static_cast<cudaStream_t>(stream)>>>( \
              p, rows);                                                                      \
    });                                                                                      \
  });                                                                                        \
  check(#kernel)

void launch(const ReduceRows& p, Dtype dtype, void* stream) {
  const int64_t rows = p.batch * p.n_out;
  FASTAST_LAUNCH(reduce_rows_kernel, p, rows, dtype, stream);
}

void launch(const GatherRows& p, Dtype dtype, void* stream) {
  const int64_t rows = p.batch * p.n;
  FASTAST_LAUNCH(gather_rows_kernel, p, rows, dtype, stream);
}

void launch(const AddNormRows& p, Dtype dtype, void* stream) {
  const int64_t rows = p.batch * p.n;
  FASTAST_LAUNCH(add_norm_rows_kernel, p, rows, dtype, stream);
}

void launch(const NormGradRuns& p, Dtype dtype, void* stream) {
  const int64_t tokens = p.batch * p.n;
  if (tokens == 0) return;
  const unsigned runs = static_cast<unsigned>((tokens + p.run - 1) / p.run);
  const size_t shared = 2 * p.d * sizeof(float);
  with_values_per_lane(p.d, [&](auto values) {
    with_type(dtype, [&](auto type) {
      norm_grad_runs_kernel<decltype(type), values()>
          <<<runs, kWarp, shared, static_cast<cudaStream_t>(stream)>>>(p);
    });
  });
  check("norm_grad_runs_kernel");
}

}  // namespace fastast
