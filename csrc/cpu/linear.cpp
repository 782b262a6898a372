// The op of linear.h: blocks of rows by panels of outputs over torch's threads.
#include "../linear.h"

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

}  // namespace

Tensor linear_cpu(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias,
                  bool gelu) {
  if (isa() != Isa::amx) throw std::runtime_error("linear needs a processor with AMX");
  if (x_.scalar_type() != ScalarType::BFloat16) throw std::runtime_error("x must be bfloat16");
  const Tensor x = has_even_rows(x_) ? x_ : torch::stable::contiguous(x_);
  const int64_t in = x.size(x.dim() - 1), panels = weight.size(0), out = panels * kLinearColumns;
  if (in == 0 || in % 32 != 0 || weight.numel() != in * out / 2)
    throw std::runtime_error("the weight is packed for another number of inputs");
  if (bias && (bias->scalar_type() != ScalarType::Float || bias->numel() != out))
    throw std::runtime_error("bias must be float32, one for each output");
  const int64_t y_row = gelu && out % 1024 == 0 ? out + 32 : out;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(y_row);
  Tensor y = torch::stable::new_empty(x, shape);
  const Linear p = {.x = data<bf16>(x),
                    .x_row = x.dim() > 1 ? x.stride(x.dim() - 2) : in,
                    .rows = x.numel() / in,
                    .in = in,
                    .weight = data<int32_t>(weight),
                    .panels = panels,
                    .bias = bias ? data<float>(*bias) : nullptr,
                    .gelu = gelu,
                    .y = mutable_data<bf16>(y),
                    .y_row = y_row};
  const int64_t worth_a_thread = 1 + (1 << 14) / in;  // some 15 microseconds
  torch::stable::parallel_for(0, p.strips() * panels, worth_a_thread,
                              [&](int64_t begin, int64_t end) {
                                Scratch<float> memory(linear_memory(p));
                                linear_blocks(p, begin, end, memory.get());
                              });
  return y_row == out ? y : torch::stable::narrow(y, x.dim() - 1, 0, out);
}

#else

Tensor linear_cpu(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool) {
  throw std::runtime_error("linear needs a processor with AMX");
}

#endif

}  // namespace fastast
