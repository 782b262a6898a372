#include "../block.h"

#include <cmath>

#include "../attention.h"
#include "../layer_norm.h"
#include "../linear.h"
#include "../match.h"
#include "common.h"

namespace fastast {

std::tuple<Tensor, Tensor, Tensor, Tensor> block_cpu(
    const Tensor& x, const Tensor& pending, const std::optional<Tensor>& size,
    const std::optional<Tensor>& log_size, std::vector<Tensor> norms, std::vector<Tensor> weights,
    std::vector<Tensor> biases, std::vector<Tensor> scales, int64_t heads, double eps1, double eps2,
    int64_t r, bool class_token, bool distill_token) {
  if (norms.size() != 4 || weights.size() != 4 || biases.size() != 4 ||
      (scales.size() != 4 && !scales.empty()))
    throw std::runtime_error("a block has two norms and four linear layers");
  const int64_t batch = x.size(0), n = x.size(1), dim = x.size(2);
  if (heads < 1 || dim % heads != 0)
    throw std::runtime_error("heads must divide the width of the tokens");
  const int64_t head = dim / heads;
  enum { kQkv, kProj, kFc1, kFc2 };
  const auto linear = [&](int layer, const Tensor& t) {
    const bool gelu = layer == kFc1;
    return scales.empty() ? linear_cpu(t, weights[layer], biases[layer], gelu)
                          : linear_int8_cpu(t, weights[layer], scales[layer], biases[layer], gelu);
  };

  const int64_t row = linear_row(dim);
  const auto [tokens, y] = add_norm_spread_cpu(x, pending, norms[0], norms[1], eps1, row);
  std::optional<Tensor> rows;
  const Tensor out = [&, &y = y] {  // what the MLP does not read is given back before it
    const Tensor qkv = linear(kQkv, y);
    if (qkv.size(2) != 3 * dim) throw std::runtime_error("qkv must have three times the width");
    const auto part = [&](int64_t i) {  // [B, H, N, Dh]
      return view(qkv, {batch, heads, n, head}, {n * 3 * dim, head, 3 * dim, 1}, i * dim);
    };
    const Tensor k = part(1);
    if (r > 0) rows = match_keys_cpu(k, r, class_token, distill_token);
    const Tensor attended = attend_cpu(part(0), k, part(2), log_size, std::pow(head, -0.5));
    return linear(kProj, view(attended, {batch, n, dim}, {n * dim, dim, 1}, 0));
  }();
  if (r == 0) {
    const auto [kept, z] = add_norm_spread_cpu(tokens, out, norms[2], norms[3], eps2, row);
    const Tensor none = empty(x, {0}, ScalarType::Float);
    return {kept, linear(kFc2, linear(kFc1, z)), none, empty(x, {0}, ScalarType::Float)};
  }
  const auto [merged, sizes, log_sizes, z] =
      merge_add_norm_spread_cpu(tokens, out, *rows, n - r, size, norms[2], norms[3], eps2, row);
  return {merged, linear(kFc2, linear(kFc1, z)), sizes, log_sizes};
}

}  // namespace fastast
