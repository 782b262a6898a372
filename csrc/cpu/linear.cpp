// The ops of linear.h: blocks of rows by panels of outputs over torch's threads.
#include "../linear.h"

#include <cmath>
#include <limits>

#include "common.h"
#include "linear_kernel.h"

namespace fastast {

#ifdef FASTAST_BF16_PRODUCTS

namespace {

// Whether all rows of the last dimension are dense and equally far apart.
bool has_even_rows(const Tensor& x) {
  if (x.dim() < 2 || x.numel() == 0) return x.is_contiguous();
  for (int64_t i = 0; i + 2 < x.dim(); ++i)
    if (x.size(i) > 1 && x.stride(i) != x.size(i + 1) * x.stride(i + 1)) return false;
  return x.stride(x.dim() - 1) == 1 && x.stride(x.dim() - 2) >= x.size(x.dim() - 1);
}

constexpr int64_t kLine = 64;  // bytes of a row of a tile

// What bf16 and int8 share: `weight` of tiles for `steps` 64-byte parts of a row of x.
void check_packed(const Tensor& weight, const std::optional<Tensor>& bias, int64_t steps) {
  if (isa() != Isa::amx) throw std::runtime_error("linear needs a processor with AMX");
  const int64_t out = weight.size(0) * kLinearColumns;
  if (steps == 0 || weight.numel() != out * steps * (kLine / 4))
    throw std::runtime_error("the weight is packed for another number of inputs");
  if (bias && (bias->scalar_type() != ScalarType::Float || bias->numel() != out))
    throw std::runtime_error("bias must be float32, one for each output");
}

// y of the shape of x but for its last dimension, and the product into it.
Tensor run(const Tensor& x, Linear p, const Tensor& weight, const std::optional<Tensor>& bias,
           bool gelu) {
  const int64_t out = weight.size(0) * kLinearColumns;
  const int64_t y_row = gelu ? linear_row(out) : out;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(y_row);
  Tensor y = empty(x, shape, ScalarType::BFloat16);
  p.rows = x.numel() / x.size(x.dim() - 1);
  p.weight = data<unsigned char>(weight);
  p.panels = weight.size(0);
  p.bias = bias ? data<float>(*bias) : nullptr;
  p.gelu = gelu;
  p.y = mutable_data<bf16>(y);
  p.y_row = y_row;
  const auto blocks = [&](const Linear& part, int64_t begin, int64_t end) {
    Scratch<unsigned char> memory(linear_memory(part));
    linear_blocks(part, begin, end, memory.get());
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (threads > 1 && p.groups() >= threads) {
    // Rows of its own for each thread, so that it reads no group of another's.
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Linear part = p.share(i, threads);
        if (part.rows > 0) blocks(part, 0, part.strips() * part.panels);
      }
    });
  } else {
    const int64_t worth_a_thread = 1 + 512 / p.steps;  // some 15 microseconds
    torch::stable::parallel_for(0, p.strips() * p.panels, worth_a_thread,
                                [&](int64_t begin, int64_t end) { blocks(p, begin, end); });
  }
  return y_row == out ? y : torch::stable::narrow(y, x.dim() - 1, 0, out);
}

}  // namespace

Tensor linear_cpu(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias,
                  bool gelu) {
  if (x_.scalar_type() != ScalarType::BFloat16) throw std::runtime_error("x must be bfloat16");
  const Tensor x = has_even_rows(x_) ? x_ : torch::stable::contiguous(x_);
  const int64_t in = x.size(x.dim() - 1);
  check_packed(weight, bias, in % 32 == 0 ? in / 32 : 0);
  Linear p = {};
  p.x = data<unsigned char>(x);
  p.x_row = 2 * (x.dim() > 1 ? x.stride(x.dim() - 2) : in);
  p.steps = in / 32;
  return run(x, p, weight, bias, gelu);
}

Tensor linear_int8_cpu(const Tensor& x_, const Tensor& weight, const Tensor& scale,
                       const std::optional<Tensor>& bias, bool gelu) {
  const Tensor x = has_even_rows(x_) ? x_ : torch::stable::contiguous(x_);
  const int64_t in = x.size(x.dim() - 1), rows = in ? x.numel() / in : 0;
  check_packed(weight, bias, in % kLine == 0 ? in / kLine : 0);
  if (scale.scalar_type() != ScalarType::Float ||
      scale.numel() != weight.size(0) * kLinearColumns || !scale.is_contiguous())
    throw std::runtime_error("scale must be float32, one for each output");
  const int64_t pitch = linear_row(in, 1);
  Scratch<int8_t> values(rows * pitch);
  Scratch<float> row_scale(rows);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Accumulate<T>;
    const T* from = data<T>(x);
    const int64_t x_row = x.dim() > 1 ? x.stride(x.dim() - 2) : in;
    torch::stable::parallel_for(0, rows, 1 + (1 << 15) / in, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A peak = kernels<T>().peak_of(from + i * x_row, in);
        const bool finite = std::isfinite(peak);
        const A factor = finite && peak >= static_cast<A>(1e-30) ? 127 / peak : 0;
        kernels<T>().round_run(from + i * x_row, in, factor, values.get() + i * pitch);
        row_scale.get()[i] =
            finite ? static_cast<float>(peak / 127) : std::numeric_limits<float>::quiet_NaN();
      }
    });
  });
  Linear p = {};
  p.x = reinterpret_cast<const unsigned char*>(values.get());
  p.x_row = pitch;
  p.steps = in / kLine;
  p.row_scale = row_scale.get();
  p.column_scale = data<float>(scale);
  return run(x, p, weight, bias, gelu);
}

#else

Tensor linear_cpu(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool) {
  throw std::runtime_error("linear needs a processor with AMX");
}

Tensor linear_int8_cpu(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                       bool) {
  throw std::runtime_error("linear needs a processor with AMX");
}

#endif

}  // namespace fastast
