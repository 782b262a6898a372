// Arguments of the row kernels (rows.h says what they compute), and their launches (rows.cu). Raw
// pointers and sizes; tensors stay in rows_ops.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastast {

// Where the rows of a [B, N, D] tensor lie, in elements.
struct Tokens {
  const void* data;
  int64_t sample, token;
};

struct Norm {
  const float *weight, *bias;  // null: no LayerNorm
  float eps;
  void* y;
  float *mean, *rstd;
};

struct ReduceRows {
  Tokens x, residual;         // residual.data null: none
  const int32_t* assignment;  // not read where the rows are listed
  const float* size;          // null: 1 each
  void* h;
  float *size_out, *log_size_out;  // null: not wanted
  Norm norm;
  int64_t batch, n, n_out, d;
  bool mean;  // else the plain sum
};

struct ReduceListedRows : ReduceRows {
  const int32_t* sources;  // of the assignment (sources.h)
};

struct GatherRows {
  Tokens x;
  const int32_t* assignment;
  const float *size, *size_out;  // size_out null: unweighted
  void* out;
  int64_t batch, n, n_out, d;
};

struct AddNormRows {
  Tokens x, residual;
  void* h;
  Norm norm;
  int64_t batch, n, d;
};

struct NormGradRuns {
  const void *grad_h, *grad_y, *h;  // [B, N', D]
  const float *weight, *mean, *rstd;
  const int32_t* assignment;  // null: N' = N, each token its own row
  const float *size, *size_out;
  void* dx;
  float *dweight, *dbias;  // [runs, D]
  int64_t batch, n, n_out, d, run;
};

// On a stream (cudaStream_t) of the current device. They throw std::runtime_error for a width that
// there is no kernel for, and if the launch fails.
void launch(const ReduceRows& p, Dtype dtype, void* stream);
void launch(const ReduceListedRows& p, Dtype dtype, void* stream);
void launch(const GatherRows& p, Dtype dtype, void* stream);
void launch(const AddNormRows& p, Dtype dtype, void* stream);
void launch(const NormGradRuns& p, Dtype dtype, void* stream);

}  // namespace fastast
