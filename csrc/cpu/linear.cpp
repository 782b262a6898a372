// The op of linear.h: strips of rows by blocks of outputs over torch's threads.
#include "../linear.h"

#include "common.h"
#include "linear_kernel.h"

namespace fastast {

#ifdef FASTAST_BF16_PRODUCTS

Tensor linear_cpu(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias,
                  int64_t out_features) {
  if (isa() != Isa::amx) throw std::runtime_error("linear needs a processor with AMX");
  if (x_.scalar_type() != ScalarType::BFloat16) throw std::runtime_error("x must be bfloat16");
  const Tensor x = dense(x_);
  const int64_t in = x.size(x.dim() - 1), columns = weight.size(0);
  if (in == 0 || in % 32 != 0 || weight.numel() != columns * in * 16 || out_features > columns * 32)
    throw std::runtime_error("the weight is packed for another number of inputs or outputs");
  if (bias && (bias->scalar_type() != ScalarType::Float || bias->numel() != columns * 32))
    throw std::runtime_error("bias must be float32, one for each packed output");
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(out_features);
  const Tensor y = torch::stable::new_empty(x, shape);
  const int64_t rows = x.numel() / in;
  const Linear p = {data<bf16>(x),
                    rows,
                    in,
                    out_features,
                    data<int32_t>(weight),
                    columns,
                    bias ? data<float>(*bias) : nullptr,
                    mutable_data<bf16>(y)};
  // A block of the weight stays in the L2 cache while all rows of x go by.
  const int64_t strips = (rows + kLinearRows - 1) / kLinearRows;
  const int64_t width = std::max<int64_t>(1, (1 << 20) / (in * 64));
  const int64_t blocks = (columns + width - 1) / width;
  torch::stable::parallel_for(0, strips * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<bf16> memory(kLinearRows * in);
    linear_start();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / strips * width;
      linear_strip(p, i % strips, block, std::min(block + width, columns), memory.get());
    }
    linear_stop();
  });
  return y;
}

#else

Tensor linear_cpu(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t) {
  throw std::runtime_error("linear needs a processor with AMX");
}

#endif

}  // namespace fastast
