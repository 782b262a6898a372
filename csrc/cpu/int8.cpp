// The op of int8.h.
#include "../int8.h"

#include <cmath>

#include "common.h"

namespace fastast {

std::tuple<Tensor, Tensor> round_to_int8_cpu(const Tensor& x_) {
  const Tensor x = dense(x_);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  const Tensor values = empty(x, shape, ScalarType::Char);
  const Tensor peak = empty(x, {}, ScalarType::Float);
  const int64_t n = x.numel();
  constexpr int64_t kRun = 1 << 15;
  const int64_t runs = (n + kRun - 1) / kRun;
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Accumulate<T>;
    const T* from = data<T>(x);
    const auto each_run = [&](auto f) {
      torch::stable::parallel_for(0, runs, 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(i, i * kRun, std::min(kRun, n - i * kRun));
      });
    };
    std::vector<A> peaks(runs);
    each_run([&](int64_t i, int64_t first, int64_t count) {
      peaks[i] = kernels<T>().peak_of(from + first, count);
    });
    A most = 0;
    for (const A p : peaks)
      if (!(p <= most) && most == most) most = p;  // NaN is more than all, and stays
    *mutable_data<float>(peak) = static_cast<float>(most);
    const A factor = most >= static_cast<A>(1e-30) && std::isfinite(most) ? 127 / most : 0;
    int8_t* to = mutable_data<int8_t>(values);
    each_run([&](int64_t, int64_t first, int64_t count) {
      kernels<T>().round_run(from + first, count, factor, to + first);
    });
  });
  return {values, peak};
}

}  // namespace fastast
