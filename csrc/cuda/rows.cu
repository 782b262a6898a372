// The row kernels of rows.h: blocks of four warps, which are four rows or one.
#include "launch.h"
#include "rows.h"
#include "width.h"

namespace fastast {
namespace {

constexpr int kBlockWarps = 4;
constexpr int kThreads = kBlockWarps * kWarp;

template <int kWarps>
FASTAST_DEVICE int64_t row_of_this_team() {
  return static_cast<int64_t>(blockIdx.x) * (kBlockWarps / kWarps) + threadIdx.x / (kWarps * kWarp);
}

template <class T, int kPerLane, int kWarps>
__global__ void __launch_bounds__(kThreads) rows_kernel(const ReduceRows p, int64_t rows) {
  const int64_t row = row_of_this_team<kWarps>();
  Team<RowLane<kPerLane>, kWarps> team;
  if (row < rows) reduce_row<T>(team, p, row);
}

template <class T, int kPerLane, int kWarps>
__global__ void __launch_bounds__(kThreads) rows_kernel(const ReduceListedRows p, int64_t rows) {
  const int64_t row = row_of_this_team<kWarps>();
  Team<RowLane<kPerLane>, kWarps> team;
  if (row < rows) reduce_row<T>(team, p, row);
}

template <class T, int kPerLane, int kWarps>
__global__ void __launch_bounds__(kThreads) rows_kernel(const GatherRows p, int64_t rows) {
  const int64_t row = row_of_this_team<kWarps>();
  Team<RowLane<kPerLane>, kWarps> team;
  if (row < rows) gather_row<T>(team, p, row);
}

template <class T, int kPerLane, int kWarps>
__global__ void __launch_bounds__(kThreads) rows_kernel(const AddNormRows p, int64_t rows) {
  const int64_t row = row_of_this_team<kWarps>();
  Team<RowLane<kPerLane>, kWarps> team;
  if (row < rows) add_norm_row<T>(team, p, row);
}

template <class T, int kPerLane, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp) runs_kernel(const NormGradRuns p) {
  extern __shared__ float sums[];
  Team<RowLane<kPerLane>, kWarps> team;
  norm_grad_run<T>(team, p, blockIdx.x, sums);
}

template <class Params>
void launch_rows(const Params& p, int64_t rows, Dtype dtype, void* stream, const char* name) {
  if (rows == 0) return;
  with_width(p.d, [&](auto values, auto warps) {
    with_type(dtype, [&](auto type) {
      constexpr int kRows = kBlockWarps / warps();
      rows_kernel<decltype(type), values(), warps()>
          <<<grid((rows + kRows - 1) / kRows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              p, rows);
    });
  });
  check_launch(name);
}

}  // namespace

void launch(const ReduceRows& p, Dtype dtype, void* stream) {
  launch_rows(p, p.batch * p.n_out, dtype, stream, "reduce_rows");
}

void launch(const ReduceListedRows& p, Dtype dtype, void* stream) {
  launch_rows(p, p.batch * p.n_out, dtype, stream, "reduce_listed_rows");
}

void launch(const GatherRows& p, Dtype dtype, void* stream) {
  launch_rows(p, p.batch * p.n, dtype, stream, "gather_rows");
}

void launch(const AddNormRows& p, Dtype dtype, void* stream) {
  launch_rows(p, p.batch * p.n, dtype, stream, "add_norm_rows");
}

void launch(const NormGradRuns& p, Dtype dtype, void* stream) {
  const int64_t tokens = p.batch * p.n;
  if (tokens == 0) return;
  with_width(p.d, [&](auto values, auto warps) {
    with_type(dtype, [&](auto type) {
      runs_kernel<decltype(type), values(), warps()>
          <<<grid((tokens + p.run - 1) / p.run), warps() * kWarp, 2 * p.d * sizeof(float),
             static_cast<cudaStream_t>(stream)>>>(p);
    });
  });
  check_launch("norm_grad_runs");
}

}  // namespace fastast
