// The backward of attention.h: heads over torch's threads.
#include "attend_backward.h"

#include "../attention.h"
#include "common.h"
#include "thread_memory.h"

namespace fastast {
namespace {

template <class T>
Heads<const T> heads_of(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}
template <class T>
Heads<T> mutable_heads_of(const Tensor& t) {
  return {mutable_data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad_, const Tensor& q_,
                                                          const Tensor& k_, const Tensor& v_,
                                                          const std::optional<Tensor>& log_size_,
                                                          const Tensor& out_, const Tensor& lse_,
                                                          double scale) {
  const Tensor grad = dense_rows(grad_), q = dense_rows(q_), k = dense_rows(k_);
  const Tensor v = dense_rows(v_), out = dense_rows(out_), lse = dense(lse_);
  const OptionalSize log_size(log_size_);
  Tensor grad_q = heads_like(q), grad_k = heads_like(k), grad_v = heads_like(v);
  if (q.numel() == 0 || k.numel() == 0) {  // empty sums
    for (Tensor* t : {&grad_q, &grad_k, &grad_v}) torch::stable::zero_(*t);
    return {grad_q, grad_k, grad_v};
  }
  dispatch(q.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const AttendBackward<T> p = {heads_of<T>(grad),
                                 heads_of<T>(q),
                                 heads_of<T>(k),
                                 heads_of<T>(v),
                                 heads_of<T>(out),
                                 log_size.row(0),
                                 data<Accumulate<T>>(lse),
                                 q.size(0),
                                 q.size(1),
                                 q.size(2),
                                 k.size(2),
                                 q.size(3),
                                 scale,
                                 mutable_heads_of<T>(grad_q),
                                 mutable_heads_of<T>(grad_k),
                                 mutable_heads_of<T>(grad_v)};
    const AttendBackwardKernel<T> kernel = attention_backward_kernel<T>();
    const int64_t bytes = kernel.memory(p);
    torch::stable::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      ThreadMemory& memory = ThreadMemory::mine();
      kernel.run(p, begin, end, memory.get(bytes));
      memory.give_back();
    });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace fastast
