#include "../match.h"

#include <cstring>
#include <limits>

#include "common.h"
#include "match_kernel.h"
#include "thread_memory.h"

namespace fastast {
namespace {

// A score and the index of its token as one integer, the smaller the better: scores fall, then
// indices rise.
template <class A>
using Rank = std::conditional_t<sizeof(A) == 4, uint64_t, unsigned __int128>;

template <class A>
Rank<A> rank(A score, int64_t i) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(A) - 1);
  score += 0;  // minus zero is zero
  Bits bits;
  std::memcpy(&bits, &score, sizeof bits);
  const Bits falling = bits & sign ? bits : ~bits ^ sign;
  return Rank<A>(falling) << 32 | static_cast<uint32_t>(i);
}
template <class R>
int32_t index_of(R rank) {
  return static_cast<int32_t>(rank & 0xffffffffu);
}

// Whether each thread gets whole samples, or shares of them.
bool enough_for_threads(int64_t batch) {
  return batch >= static_cast<int64_t>(torch::stable::get_num_threads());
}

struct Request {
  int64_t n, c, r;  // r: at least 1
  bool class_token, distill_token;
  int64_t na() const { return (n + 1) / 2; }
};

// The output row of every token of one sample from the best proposal of each token of A.
template <class A>
void assign_rows(const Request& p, const A* best, const int32_t* partner, Rank<A>* ranks,
                 int32_t* assignment) {
  const int64_t na = p.na(), kept = na - p.r;
  for (int64_t i = 0; i < na; ++i) ranks[i] = rank(best[i], i);
  std::nth_element(ranks, ranks + p.r - 1, ranks + na);

  // DIST is the first of B and goes to row 1; the kept of A but the first then start at row 2.
  const auto row_of_b = [&](int64_t j) {
    return static_cast<int32_t>(p.distill_token && j == 0 ? 1 : kept + j);
  };
  const auto row_of_kept = [&](int64_t k) {
    return static_cast<int32_t>(p.distill_token && k > 0 ? k + 1 : k);
  };
  for (int64_t j = 0; j < p.n / 2; ++j) assignment[2 * j + 1] = row_of_b(j);
  for (int64_t i = 0; i < na; ++i) assignment[2 * i] = -1;
  for (int64_t k = 0; k < p.r; ++k) {
    const int32_t i = index_of(ranks[k]);
    assignment[2 * i] = row_of_b(partner[i]);
  }
  if (p.class_token) {
    int64_t k = 0;
    for (int64_t i = 0; i < na; ++i)
      if (assignment[2 * i] < 0) assignment[2 * i] = row_of_kept(k++);
  } else {
    std::sort(ranks + p.r, ranks + na);
    for (int64_t k = 0; k < kept; ++k) assignment[2 * index_of(ranks[p.r + k])] = row_of_kept(k);
  }
}

// Metrics as they are given, [batch, n, c].
template <class T>
struct Metrics {
  using Value = T;
  const T* tokens;

  bool pack(const Request& p, const MatchKernel<T>& kernel, int64_t b,
            unsigned char* memory) const {
    return kernel.pack(tokens + b * p.n * p.c, p.n, p.c, p.distill_token, 0, p.n, memory);
  }
};

// Metrics made of keys [batch, heads, n, c] as they are packed: never written but for some tokens
// at a time.
template <class T>
struct Keys {
  using Value = float;
  const T* k;
  int64_t heads, sample_stride, head_stride, token_stride;

  bool pack(const Request& p, const MatchKernel<float>& kernel, int64_t b,
            unsigned char* memory) const {
    Scratch<float> metric(kernel.step * p.c);
    bool finite = true;
    for (int64_t begin = 0; begin < p.n; begin += kernel.step) {
      const int64_t end = std::min(begin + kernel.step, p.n);
      kernels<T>().key_metric_rows(k + b * sample_stride, heads, head_stride, token_stride, p.c,
                                   begin, end, metric.get());
      finite &= kernel.pack(metric.get(), p.n, p.c, p.distill_token, begin, end, memory);
    }
    return finite;
  }
};

// One sample's matching at a time, with the memory it needs but for the packed tokens.
template <class A>
struct Proposals {
  explicit Proposals(int64_t na) : best(na), partner(na), ranks(na) {}
  void select(const Request& p, int32_t* assignment) {
    if (p.class_token) best.get()[0] = -std::numeric_limits<A>::infinity();
    assign_rows(p, best.get(), partner.get(), ranks.get(), assignment);
  }
  Scratch<A> best;
  Scratch<int32_t> partner;
  Scratch<Rank<A>> ranks;
};

template <class Tokens>
void match_batch(const Tokens& tokens, int64_t batch, const Request& p, int32_t* assignment) {
  using T = typename Tokens::Value;
  using A = Accumulate<T>;
  const MatchKernel<T> kernel = match_kernel<T>();
  const int64_t n = p.n, na = p.na(), bytes = kernel.memory(n, p.c);
  std::vector<char> finite(batch);
  if (enough_for_threads(batch)) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      ThreadMemory& memory = ThreadMemory::mine();
      unsigned char* const packed = memory.get(bytes);
      Proposals<A> proposals(na);
      for (int64_t b = begin; b < end; ++b) {
        finite[b] = tokens.pack(p, kernel, b, packed);
        kernel.score(n, p.c, packed, 0, na, proposals.best.get(), proposals.partner.get());
        proposals.select(p, assignment + b * n);
      }
      memory.give_back();
    });
  } else {
    // Threads share the strips of each sample. What to pack they do not: each is done with all of
    // it before it could read half of it from another core.
    Proposals<A> proposals(na);
    const int64_t strips = (na + kernel.strip - 1) / kernel.strip;
    const int64_t grain = 1 + kernel.grain / (kernel.strip * (n / 2) * std::max<int64_t>(p.c, 1));
    for (int64_t b = 0; b < batch; ++b) {
      torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
        ThreadMemory& memory = ThreadMemory::mine();
        unsigned char* const packed = memory.get(bytes);
        const bool all_finite = tokens.pack(p, kernel, b, packed);
        if (begin == 0) finite[b] = all_finite;
        kernel.score(n, p.c, packed, begin * kernel.strip, std::min(end * kernel.strip, na),
                     proposals.best.get(), proposals.partner.get());
        memory.give_back();
      });
      proposals.select(p, assignment + b * n);
    }
  }
  for (int64_t b = 0; b < batch; ++b)
    if (!finite[b])
      throw std::runtime_error("metric must be finite, but sample " + std::to_string(b) +
                               " has a NaN or infinite value");
}

// Tokens that are merged when asked for r: at most half of the unprotected ones.
int64_t effective_r(int64_t n, int64_t r, bool class_token, bool distill_token) {
  const int64_t most = n / 2 - distill_token < 1 ? 0 : (n - class_token - distill_token) / 2;
  return std::clamp<int64_t>(r, 0, most);
}

// The sources of an assignment to n_out rows: offsets, then tokens.
Tensor sources_of(const Tensor& assignment, int64_t n_out) {
  const int64_t batch = assignment.size(0), n = assignment.size(1), width = n_out + 1 + n;
  const Inverse inverse(assignment, n_out);
  const Tensor out = empty(assignment, {batch, width});
  for (int64_t b = 0; b < batch; ++b) {
    int32_t* offsets = mutable_data<int32_t>(out) + b * width;
    std::copy_n(inverse[b].offsets, n_out + 1, offsets);
    std::copy_n(inverse[b].tokens, n, offsets + n_out + 1);
  }
  return out;
}

}  // namespace

namespace {

// Assignments int32 [batch, n]; fill(assignment, request) where something is to be merged.
template <class F>
Tensor assign(const Tensor& like, int64_t batch, Request p, const F& fill) {
  const Tensor out = empty(like, {batch, p.n}, ScalarType::Int);
  int32_t* assignment = mutable_data<int32_t>(out);
  p.r = effective_r(p.n, p.r, p.class_token, p.distill_token);
  if (p.r > 0)
    fill(p, assignment);
  else
    for (int64_t i = 0; i < batch * p.n; ++i) assignment[i] = static_cast<int32_t>(i % p.n);
  return out;
}

}  // namespace

Tensor bipartite_match_cpu(const Tensor& metric_, int64_t r, bool class_token, bool distill_token) {
  const Tensor metric = dense(metric_);
  const int64_t batch = metric.size(0);
  const Request request = {metric.size(1), metric.size(2), r, class_token, distill_token};
  return assign(metric, batch, request, [&](const Request& p, int32_t* assignment) {
    dispatch(metric.scalar_type(), [&](auto t) {
      match_batch(Metrics<decltype(t)>{data<decltype(t)>(metric)}, batch, p, assignment);
    });
  });
}

Tensor key_metric_cpu(const Tensor& k_) {
  const Tensor k = dense_rows(k_);
  const int64_t batch = k.size(0), heads = k.size(1), n = k.size(2), d = k.size(3);
  Tensor out = empty(k, {batch, n, d}, ScalarType::Float);
  dispatch(k.scalar_type(), [&](auto t) {
    using T = decltype(t);
    parallel_rows(batch, n, heads * d, [&](int64_t b, int64_t begin, int64_t end) {
      kernels<T>().key_metric_rows(data<T>(k) + b * k.stride(0), heads, k.stride(1), k.stride(2), d,
                                   begin, end, mutable_data<float>(out) + (b * n + begin) * d);
    });
  });
  return out;
}

Tensor match_keys_cpu(const Tensor& k_, int64_t r, bool class_token, bool distill_token) {
  const int64_t batch = k_.size(0);
  if (!enough_for_threads(batch))
    return bipartite_match_cpu(key_metric_cpu(k_), r, class_token, distill_token);
  const Tensor k = dense_rows(k_);
  const Request request = {k.size(2), k.size(3), r, class_token, distill_token};
  return assign(k, batch, request, [&](const Request& p, int32_t* assignment) {
    dispatch(k.scalar_type(), [&](auto t) {
      using T = decltype(t);
      const Keys<T> keys = {data<T>(k), k.size(1), k.stride(0), k.stride(1), k.stride(2)};
      match_batch(keys, batch, p, assignment);
    });
  });
}

std::tuple<Tensor, Tensor> bipartite_match_sources_cpu(const Tensor& metric, int64_t r,
                                                       bool class_token, bool distill_token) {
  const Tensor rows = bipartite_match_cpu(metric, r, class_token, distill_token);
  const int64_t n = metric.size(1);
  return {rows, sources_of(rows, n - effective_r(n, r, class_token, distill_token))};
}

std::tuple<Tensor, Tensor> match_keys_sources_cpu(const Tensor& k, int64_t r, bool class_token,
                                                  bool distill_token) {
  const Tensor rows = match_keys_cpu(k, r, class_token, distill_token);
  const int64_t n = k.size(2);
  return {rows, sources_of(rows, n - effective_r(n, r, class_token, distill_token))};
}

}  // namespace fastast
