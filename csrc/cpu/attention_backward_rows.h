// The backward of attention, a head at a time, on an engine of matrix products
// (attention_engine.h).
//
//   P = exp(S scale + bias - lse)          S = Q K', bias = log_size; as the forward had it
//   dS = P (dO V' - delta)                 delta = the sums of the rows of dO O
//   dV = P' dO,  dK = scale dS' Q,  dQ = scale dS K
//
// Blocks of kKeys keys outside, of kQueries queries inside, so that P and dS never leave the L2
// cache: what is written of a head is its three gradients, what is read q, k, v, dO and O once and
// their packed forms once a block of keys. dV and dK of a block of keys add up beside it, dQ over
// the whole head, in one order: no atomics, no bit that depends on threads.
//
// All is kept transposed, a row for each key: S' = K Q' and V dO' come out such that a row of P'
// and of dS' is what the engine wants on the left for dV and dK; dQ' = K' dS' takes dS' on the
// right. So nothing of N x N is ever transposed, and dQ' once.
#pragma once

#include "attention_engine.h"
#include "attention_pack.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

template <class T, class Engine>
class HeadBackward {
  using A = Accumulate<T>;
  using Element = typename Engine::Element;
  using Pair = typename Engine::Pair;
  using Tokens = Packing<T, Engine>;
  static constexpr int64_t kRows = Engine::kRows, kWide = Engine::kWide, kPair = Engine::kPair;
  static constexpr int64_t kKeys = 256 / kRows * kRows, kQueries = 256;
  static constexpr int64_t kPitch = kQueries + kWide;  // of rows of P' and dS'
  static constexpr int64_t kTurned = Tokens::turned_pitch(kKeys);

 public:
  // Of `memory` only the size is asked for where it is null.
  HeadBackward(const AttendBackward<T>& p_, unsigned char* memory)
      : p(p_),
        n_q(up_to(p.n_q, kWide)),
        n(up_to(p.n, kRows)),
        depth(up_to(p.d, Engine::kStep)),
        width(up_to(p.d, kWide)),
        rows(up_to(p.d, kRows)) {
    Arena arena(memory);
    key_rows = arena.template take<Element>(Tokens::rows_size(n, depth));
    value_rows = arena.template take<Element>(Tokens::rows_size(n, depth));
    keys_turned = arena.template take<Element>(up_to(n, kKeys) / kKeys * rows * kTurned);
    queries_across = arena.template take<Pair>(n_q * depth / kPair);
    grads_across = arena.template take<Pair>(n_q * depth / kPair);
    queries_down = arena.template take<Pair>(n_q * width / kPair);
    grads_down = arena.template take<Pair>(n_q * width / kPair);
    bias = arena.template take<A>(n);
    lse = arena.template take<A>(n_q);
    delta = arena.template take<A>(n_q);
    scores = arena.template take<A>(kRows * kWide);
    pulls = arena.template take<A>(kRows * kWide);
    weights = arena.template take<Element>(kRows * kPitch);
    slopes = arena.template take<Element>(kKeys * kPitch);
    if (kPair > 1) slope_pairs = arena.template take<Pair>(kKeys / kPair * kPitch);
    grad_q = arena.template take<A>(up_to(n_q, kQueries) * rows);
    grad_k = arena.template take<A>(kKeys * width);
    grad_v = arena.template take<A>(kKeys * width);
    size = arena.used(memory);
  }

  void run(int64_t b, int64_t h);
  int64_t size;  // bytes of memory

 private:
  void pack(int64_t b, int64_t h);
  template <int64_t a_pitch>
  static FASTAST_INLINE void multiply(int64_t rows, int64_t wide, const Element* a, const Pair* b,
                                      int64_t pitch, int64_t depth, A* c, int64_t c_pitch,
                                      bool add) {
    multiply_part<Engine, a_pitch>(rows, wide, a, b, pitch, depth, c, c_pitch, add);
  }
  void score(int64_t keys, int64_t queries, const Element* left, const Pair* right, A* to) const;
  void weigh(int64_t key, int64_t keys, int64_t query, Element* weight, Element* slope,
             Pair* pairs) const;
  void block(int64_t key0, int64_t keys, int64_t query0, int64_t queries);
  void store_keys(const Heads<T>& to, int64_t b, int64_t h, int64_t key0, const A* sums,
                  A scale) const;
  void store_queries(T* to) const;

  const AttendBackward<T>& p;
  const int64_t n_q, n, depth, width, rows;      // padded; d as depth, as columns and as rows
  Element *key_rows, *value_rows, *keys_turned;  // on the left
  Pair *queries_across, *grads_across;           // on the right, of S' and V dO'
  Pair *queries_down, *grads_down;               // on the right, of dK and dV
  A *bias, *lse, *delta;                         // in the engine's unit but for delta
  A *scores, *pulls;                             // S' and V dO' of kRows keys and kWide queries
  Element *weights, *slopes;                     // P' of kRows keys, dS' of kKeys, kPitch apart
  Pair* slope_pairs = nullptr;                   // dS', pairs of keys
  A* grad_q;                                     // [n_q / kQueries, rows, kQueries]
  A *grad_k, *grad_v;                            // [width / kWide, kKeys, kWide]
  const A factor = static_cast<A>(p.scale * Engine::kUnit);
};

template <class T, class Engine>
void HeadBackward<T, Engine>::pack(int64_t b, int64_t h) {
  const Tokens q{p.q.of(b, h), p.q.token, p.n_q, p.d}, k{p.k.of(b, h), p.k.token, p.n, p.d};
  const Tokens v{p.v.of(b, h), p.v.token, p.n, p.d};
  const Tokens grad{p.grad.of(b, h), p.grad.token, p.n_q, p.d};
  k.rows(n, depth, key_rows);
  v.rows(n, depth, value_rows);
  for (int64_t j = 0; j < n; j += kKeys)
    k.turned(j, kKeys, rows, keys_turned + j / kKeys * rows * kTurned);
  q.across(n_q, depth, queries_across);
  grad.across(n_q, depth, grads_across);
  q.down(n_q, width, queries_down);
  grad.down(n_q, width, grads_down);
  const A unit = static_cast<A>(Engine::kUnit);
  for (int64_t j = 0; j < n; ++j)
    bias[j] = j >= p.n ? -INFINITY : p.log_size == nullptr ? 0 : p.log_size[b * p.n + j] * unit;
  const T* out = p.out.of(b, h);
  for (int64_t i = 0; i < n_q; ++i) {
    const bool there = i < p.n_q;  // a query that is not gives no key any weight
    lse[i] = there ? p.lse[(b * p.heads + h) * p.n_q + i] * unit : INFINITY;
    delta[i] = there ? dot(grad.tokens + i * p.grad.token, out + i * p.out.token, p.d) : 0;
  }
}

// Products over all dims.
template <class T, class Engine>
FASTAST_INLINE void HeadBackward<T, Engine>::score(int64_t keys, int64_t queries,
                                                   const Element* left, const Pair* right,
                                                   A* to) const {
  if (depth <= Tokens::kShort) {
    multiply<Tokens::kShort>(keys, queries, left, right, kWide, depth, to, kWide, false);
    return;
  }
  constexpr int64_t kPiece = Tokens::kPiece, kLong = Tokens::kLong;
  for (int64_t c = 0; c < depth; c += kPiece)
    multiply<kLong>(keys, queries, left + c / kPiece * kRows * kLong, right + c / kPair * kWide,
                    kWide, depth - c < kPiece ? depth - c : kPiece, to, kWide, c > 0);
}

// P' and dS' of the scores and pulls of `keys` keys and kWide queries.
template <class T, class Engine>
FASTAST_INLINE void HeadBackward<T, Engine>::weigh(int64_t key, int64_t keys, int64_t query,
                                                   Element* weight, Element* slope,
                                                   Pair* pairs) const {
  const Vec<A> factors = splat<A>(factor);
  Vec<A> less[2], mean[2];
  for (int64_t u = 0; u < 2; ++u) {
    less[u] = load_raw(lse + query + u * lanes<A>);
    mean[u] = load_raw(delta + query + u * lanes<A>);
  }
  for (int64_t j = 0; j < keys; ++j) {
    const Vec<A> more = splat<A>(bias[key + j]);
    Vec<A> of_p[2], of_s[2];
    for (int64_t u = 0; u < 2; ++u) {
      const int64_t at = j * kWide + u * lanes<A>;
      of_p[u] = Engine::power(load_raw(scores + at) * factors + (more - less[u]));
      of_s[u] = of_p[u] * (load_raw(pulls + at) - mean[u]);
    }
    Engine::put(weight + j * kPitch, of_p[0], of_p[1]);
    Engine::put(slope + j * kPitch, of_s[0], of_s[1]);
    if constexpr (kPair > 1)
      if (j % 2 == 1)
        Engine::put_pairs(pairs + j / 2 * kPitch, slope + (j - 1) * kPitch, slope + j * kPitch);
  }
}

// What a block of keys and one of queries have to do with each other.
template <class T, class Engine>
void HeadBackward<T, Engine>::block(int64_t key0, int64_t keys, int64_t query0, int64_t queries) {
  for (int64_t j = 0; j < keys; j += kRows) {
    Element* const slope = slopes + j * kPitch;
    const int64_t left = (key0 + j) * Tokens::row_size(depth);
    for (int64_t i = 0; i < queries; i += kWide) {
      const int64_t right = (query0 + i) * depth / kPair;
      score(keys - j, queries - i, key_rows + left, queries_across + right, scores);
      score(keys - j, queries - i, value_rows + left, grads_across + right, pulls);
      weigh(key0 + j, keys - j < kRows ? keys - j : kRows, query0 + i, weights + i, slope + i,
            slope_pairs + (kPair > 1 ? j / kPair * kPitch + i : 0));
    }
    for (int64_t c = 0; c < p.d; c += kWide) {
      const int64_t down = (c * n_q + query0 * kWide) / kPair, sum = c * kKeys + j * kWide;
      multiply<kPitch>(keys - j, p.d - c, weights, grads_down + down, kWide, queries, grad_v + sum,
                       kWide, query0 > 0);
      multiply<kPitch>(keys - j, p.d - c, slope, queries_down + down, kWide, queries, grad_k + sum,
                       kWide, query0 > 0);
    }
  }
  const Element* turned = keys_turned + key0 / kKeys * rows * kTurned;
  const Pair* right = slope_pairs;
  if constexpr (kPair == 1) right = slopes;
  A* const to = grad_q + query0 * rows;
  for (int64_t c = 0; c < p.d; c += kRows)
    for (int64_t i = 0; i < queries; i += kWide)
      multiply<kTurned>(p.d - c, queries - i, turned + c * kTurned, right + i, kPitch, keys,
                        to + c * kQueries + i, kQueries, key0 > 0);
}

template <class T, class Engine>
void HeadBackward<T, Engine>::store_keys(const Heads<T>& to, int64_t b, int64_t h, int64_t key0,
                                         const A* sums, A scale) const {
  const int64_t end = key0 + kKeys < p.n ? kKeys : p.n - key0;
  for (int64_t j = 0; j < end; ++j) {
    T* row = to.of(b, h) + (key0 + j) * to.token;
    const auto at = [&](int64_t c) {
      return sums + c / kWide * kWide * kKeys + j * kWide + c % kWide;
    };
    for_each_lane<A>(
        p.d, [&](int64_t c) { store(row + c, load_raw(at(c)) * splat<A>(scale)); },
        [&](int64_t c) { from_acc(*at(c) * scale, row + c); });
  }
}

// dQ from dQ', whose columns lie as the engine has left those of dS'.
template <class T, class Engine>
void HeadBackward<T, Engine>::store_queries(T* to) const {
  constexpr int64_t L = lanes<A>;
  const Vec<A> scale = splat<A>(static_cast<A>(p.scale));
  for (int64_t i = 0; i < n_q; i += L) {
    const A* from = grad_q + i / kQueries * kQueries * rows + i % kQueries;
    for (int64_t c = 0; c < p.d; c += L) {
      Vec<A> block[L];
#pragma GCC unroll 16
      for (int64_t row = 0; row < L; ++row)
        block[row] = c + row < p.d ? load_raw(from + (c + row) * kQueries) * scale : Vec<A>{};
      transpose(block, Lanes<L>());
#pragma GCC unroll 16
      for (int64_t column = 0; column < L; ++column) {
        const int64_t query = i / kWide * kWide + Engine::lane_at(i % kWide + column);
        if (query >= p.n_q) continue;
        T* row = to + query * p.grad_q.token + c;
        if (c + L <= p.d)
          store(row, block[column]);
        else
          for (int64_t u = 0; c + u < p.d; ++u) from_acc(block[column][u], row + u);
      }
    }
  }
}

template <class T, class Engine>
void HeadBackward<T, Engine>::run(int64_t b, int64_t h) {
  pack(b, h);
  // Of a block: what its last product computes of it.
  const auto covered = [](int64_t left, int64_t block, int64_t whole, int64_t few) {
    if (left >= block) return block;
    const int64_t rest = left % whole;
    return left - rest + (rest == 0 ? 0 : rest <= few ? few : whole);
  };
  for (int64_t j = 0; j < p.n; j += kKeys) {
    const int64_t keys = covered(p.n - j, kKeys, kRows, Engine::kFewRows);
    for (int64_t i = 0; i < p.n_q; i += kQueries)
      block(j, keys, i, covered(p.n_q - i, kQueries, kWide, Engine::kFewWide));
    store_keys(p.grad_k, b, h, j, grad_k, static_cast<A>(p.scale));
    store_keys(p.grad_v, b, h, j, grad_v, 1);
  }
  store_queries(p.grad_q.of(b, h));
}

// Heads [begin, end) of all samples.
template <class T, class Engine>
void attend_backward_heads(const AttendBackward<T>& p, int64_t begin, int64_t end,
                           unsigned char* memory) {
  HeadBackward<T, Engine> head(p, memory);
  Engine::start();
  for (int64_t at = begin; at < end; ++at) head.run(at / p.heads, at % p.heads);
  Engine::stop();
}

template <class T, class Engine>
int64_t attend_backward_memory(const AttendBackward<T>& p) {
  return HeadBackward<T, Engine>(p, nullptr).size;
}

template <class T, class Engine>
constexpr AttendBackwardKernel<T> attend_backward_kernel() {
  return {attend_backward_memory<T, Engine>, attend_backward_heads<T, Engine>};
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
