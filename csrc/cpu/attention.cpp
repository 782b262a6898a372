// The op of attention.h: blocks of queries over torch's threads.
#include "../attention.h"

#include <cmath>
#include <cstring>

#include "attend.h"
#include "common.h"
#include "thread_memory.h"

namespace fastast {
namespace {

template <class T>
void attend(const Attend<T>& p) {
  if (p.n == 0) {  // an empty sum
    const int64_t rows = p.batch * p.heads * p.n_q;
    std::memset(p.out, 0, sizeof(T) * rows * p.d);
    if (p.lse) std::fill_n(p.lse, rows, -INFINITY);
    return;
  }
  const AttendKernel<T> kernel = attention_kernel<T>();
  const int64_t bytes = kernel.memory(p);
  const int64_t blocks = p.batch * p.heads * ((p.n_q + kernel.rows - 1) / kernel.rows);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    ThreadMemory& memory = ThreadMemory::mine();
    kernel.run(p, begin, end, memory.get(bytes));
    memory.give_back();
  });
}

// The output, and the log-sum-exp if there is a tensor for it.
Tensor run(const Tensor& q_, const Tensor& k_, const Tensor& v_,
           const std::optional<Tensor>& log_size_, double scale, const Tensor* lse) {
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  const OptionalSize log_size(log_size_);
  const int64_t batch = q.size(0), heads = q.size(1), n_q = q.size(2), n = k.size(2), d = q.size(3);
  const Tensor out = heads_like(q);
  dispatch(q.scalar_type(), [&](auto t) {
    using T = decltype(t);
    attend(Attend<T>{data<T>(q),
                     data<T>(k),
                     data<T>(v),
                     q.stride(0),
                     q.stride(1),
                     q.stride(2),
                     k.stride(0),
                     k.stride(1),
                     k.stride(2),
                     v.stride(0),
                     v.stride(1),
                     v.stride(2),
                     log_size.row(0),
                     batch,
                     heads,
                     n_q,
                     n,
                     d,
                     scale,
                     mutable_data<T>(out),
                     lse ? mutable_data<Accumulate<T>>(*lse) : nullptr});
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& log_size, double scale) {
  const ScalarType statistic =
      q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2)}, statistic);
  return {run(q, k, v, log_size, scale, &lse), lse};
}

Tensor attend_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                  const std::optional<Tensor>& log_size, double scale) {
  return run(q, k, v, log_size, scale, nullptr);
}

}  // namespace fastast
