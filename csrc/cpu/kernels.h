// The table of row kernels that every instruction set fills: kernels_{avx512,avx2,portable}.cpp
// compile the same sources (merge_rows.h, norm_rows.h and others) for their registers.
//
// A kernel works on a range of rows of one sample and touches nothing outside it, so that its
// caller may split a batch over threads in any way without changing a bit of the result. Every
// pointer is to dense row-major memory unless a stride is given.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace fastast {

// The inverse of an assignment: row i is made of tokens[offsets[i] .. offsets[i + 1]), ascending.
// Null offsets mean that row i is token i.
struct Sources {
  int64_t first(int64_t i) const { return offsets == nullptr ? i : offsets[i]; }
  int64_t last(int64_t i) const { return offsets == nullptr ? i + 1 : offsets[i + 1]; }
  int64_t token(int64_t s) const { return tokens == nullptr ? s : tokens[s]; }

  const int32_t* offsets = nullptr;
  const int32_t* tokens = nullptr;
};

// LayerNorm of h = x + residual, or of the size-weighted mean of h over each row's tokens.
template <class T>
struct AddNorm {
  using A = Accumulate<T>;
  const T* x;         // [n, d]
  const T* residual;  // [n, d]
  const float* size;  // [n] or null: 1 each
  Sources sources;
  const A* weight;  // [d]
  const A* bias;    // [d]
  A eps;
  int64_t d;
  T* h;             // [rows, d]
  float* size_out;  // [rows] or null
  T* y;             // [rows, d], y_row elements apart
  int64_t y_row;
  A* mean;  // [rows], or null where no backward follows, as is rstd
  A* rstd;  // [rows]
};

template <class T>
struct AddNormGrad {
  using A = Accumulate<T>;
  const T* grad_h;        // [rows, d]
  const T* grad_y;        // [rows, d]
  const T* h;             // [rows, d]
  const A* weight;        // [d]
  const A* mean;          // [rows]
  const A* rstd;          // [rows]
  const float* size;      // [n] or null
  const float* size_out;  // [rows] or null
  Sources sources;
  int64_t d;
  T* grad;  // [n, d]: of x and of residual alike
};

template <class T>
struct Kernels {
  using A = Accumulate<T>;

  // out[i] = sum_j size_j x_j / sum_j size_j over the tokens j of row i; size_out[i] = sum_j
  // size_j.
  void (*merge_rows)(const T* x, const float* size, Sources sources, int64_t d, int64_t begin,
                     int64_t end, T* out, float* size_out);
  // out[i] = sum_j x_j: the backward of gather_rows.
  void (*sum_rows)(const T* x, Sources sources, int64_t d, int64_t begin, int64_t end, T* out);
  // out[j] = rows[assignment[j]], or 0 where that is -1; with size_out scaled by size_j /
  // size_out[row], which is the backward of merge_rows.
  void (*gather_rows)(const T* rows, const int32_t* assignment, const float* size,
                      const float* size_out, int64_t d, int64_t begin, int64_t end, T* out);

  void (*add_norm_rows)(const AddNorm<T>& p, int64_t begin, int64_t end);
  // Adds the rows' share to grad_weight and grad_bias [d].
  void (*add_norm_grad_rows)(const AddNormGrad<T>& p, int64_t begin, int64_t end, A* grad_weight,
                             A* grad_bias);

  // out[n - begin] = unit vector of sum_h k[h, n]: strides in elements, the last dimension dense.
  void (*key_metric_rows)(const T* k, int64_t heads, int64_t head_stride, int64_t row_stride,
                          int64_t d, int64_t begin, int64_t end, float* out);

  // max |x| of n values, NaN if one is not finite or no number.
  A (*peak_of)(const T* x, int64_t n);
  // out = x factor to the nearest integer.
  void (*round_run)(const T* x, int64_t n, A factor, int8_t* out);
};

template <class T>
const Kernels<T>& portable_kernels();
#ifdef FASTAST_X86_VARIANTS
template <class T>
const Kernels<T>& avx2_kernels();
template <class T>
const Kernels<T>& avx512_kernels();
#endif

template <class T>
const Kernels<T>& kernels() {
#ifdef FASTAST_X86_VARIANTS
  if (isa() >= Isa::avx512) return avx512_kernels<T>();
  if (isa() == Isa::avx2) return avx2_kernels<T>();
#endif
  return portable_kernels<T>();
}

}  // namespace fastast
