// Attention of blocks of queries, on the vectors of vec.h and an engine of matrix products.
//
// A head's keys are packed once, kWide of them beside each other, and its values likewise; then a
// block of kRows queries goes past them, kChunk keys at a time:
//
//   S = Q K'                              kRows x kWide, in the L1 cache
//   P = exp(S scale + bias - m)           bias = log_size; or as a power of two, all times log2(e)
//   O += P V                              and the sums of the rows of P
//
// m need not be the largest logit of the row, only near it: the exponents of fp32 and bf16 reach
// far beyond the 2^64 that is let pass. So it is the largest of the first kWide keys, which costs
// no pass over the others and lets O add up without rescaling. Where a row's sum shows that this
// was too far off, the block is done again with the true maximum.
#pragma once

#include "attention_engine.h"
#include "attention_pack.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kPitch = kChunk + 32;  // not a power of two: rows must not share cache sets

template <class T, class Engine>
struct AttendHead {
  using A = Accumulate<T>;
  using Element = typename Engine::Element;
  using Pair = typename Engine::Pair;
  static constexpr int64_t kRows = Engine::kRows, kWide = Engine::kWide, kPair = Engine::kPair;

  // Of `memory` only the size is asked for where it is null.
  AttendHead(const Attend<T>& p_, unsigned char* memory)
      : p(p_),
        n(up_to(p.n, kWide > Engine::kStep ? kWide : Engine::kStep)),
        n_values(up_to(p.n, Engine::kStep)),
        depth(up_to(p.d, Engine::kStep)),
        width(up_to(p.d, kWide)) {
    Arena arena(memory);
    keys = arena.template take<Pair>(n * depth / kPair);
    values = arena.template take<Pair>(n_values * width / kPair);
    bias = arena.template take<A>(n);
    start = arena.template take<A>(n);
    query = arena.template take<Element>(query_size());
    weights = arena.template take<Element>(2 * kRows * kPitch);
    scores = arena.template take<A>(2 * kRows * kWide);
    sums = arena.template take<A>(kRows * lanes<A>);
    out = arena.template take<A>(kRows * width);
    size = arena.used(memory);
  }

  // Queries of more than kChunk dims lie in pieces of so many.
  int64_t query_size() const { return up_to(depth, kChunk) / kChunk * kRows * kPitch; }
  static FASTAST_INLINE int64_t query_at(int64_t c) {
    return c / kChunk * kRows * kPitch + c % kChunk;
  }
  void pack(int64_t b, int64_t h);
  void blocks(int64_t b, int64_t h, int64_t begin, int64_t end);
  int64_t size;  // bytes of memory

 private:
  int64_t rows_of(int64_t block) const;
  void block(int64_t b, int64_t h, int64_t at);
  void load_query(int64_t b, int64_t h, int64_t i, Element* to) const;
  bool add_up(int64_t i, A& total) const;
  void write(int64_t b, int64_t h, int64_t i, const A* row, A share) const;
  void logits(const A* s, int64_t j, Vec<A>& low, Vec<A>& high) const;
  void guess(A* m) const;
  void score(int64_t j, A* s);
  void weigh(const A* s, int64_t j, const A* m, int64_t begin, int64_t end, Element* to);
  void attend(A* m, bool known);
  void largest(A* m);
  void clear_unused();

  const Attend<T>& p;
  const int64_t n, n_values, depth, width;  // keys, values, their dims; padded
  int64_t rows = kRows;                     // of the block
  Pair *keys, *values;
  A* bias;              // of the logits; minus infinity beyond the last key
  A* start;             // of the scores, for engines that begin with it: the bias before the factor
  int64_t biased = -1;  // whose bias it is
  Element *query, *weights;
  A *scores, *sums, *out;
  const A factor = static_cast<A>(p.scale * Engine::kUnit);
};

template <class T, class Engine>
void AttendHead<T, Engine>::pack(int64_t b, int64_t h) {
  using Tokens = Packing<T, Engine>;
  Tokens{p.k + b * p.k_sample + h * p.k_head, p.k_token, p.n, p.d}.across(
      up_to(p.n, Engine::kFewWide), depth, keys);
  Tokens{p.v + b * p.v_sample + h * p.v_head, p.v_token, p.n, p.d}.down(n_values, width, values,
                                                                        Engine::weight_at);
  // The queries' dims beyond the last will be multiplied by zeros; garbage may not be.
  if (depth > p.d) std::memset(query, 0, sizeof(Element) * query_size());
  if (b == biased) return;
  biased = b;
  for (int64_t j = 0; j < n; ++j) {
    bias[j] = j >= p.n ? -INFINITY : p.log_size == nullptr ? 0 : p.log_size[b * p.n + j];
    bias[j] *= static_cast<A>(Engine::kUnit);
    start[j] = bias[j] / factor;
  }
}

// Query i of a head. What is read for the one kRows on, and written for this one, is asked for.
template <class T, class Engine>
FASTAST_INLINE void AttendHead<T, Engine>::load_query(int64_t b, int64_t h, int64_t i,
                                                      Element* to) const {
  const T* q = p.q + b * p.q_sample + h * p.q_head;
  prefetch(q, i + kRows, p.n_q, p.q_token, p.d);
  prefetch(p.out + (b * p.n_q * p.heads + h) * p.d, i, p.n_q, p.heads * p.d, p.d);
  const T* row = q + i * p.q_token;
  for_each_lane<A>(
      p.d,
      [&](int64_t c) {
        if constexpr (std::is_same_v<T, Element>)
          std::memcpy(to + query_at(c), row + c, lanes<A> * sizeof(T));
        else
          store_raw(to + query_at(c), load(row + c));
      },
      [&](int64_t c) {
        if constexpr (std::is_same_v<T, Element>)
          to[query_at(c)] = row[c];
        else
          to[query_at(c)] = to_acc(row[c]);
      });
}

// The logits of a row and kWide keys from key j on, times kUnit.
template <class T, class Engine>
FASTAST_INLINE void AttendHead<T, Engine>::logits(const A* s, int64_t j, Vec<A>& low,
                                                  Vec<A>& high) const {
  low = load_raw(s) * splat<A>(factor) + load_raw(bias + j);
  high = load_raw(s + lanes<A>) * splat<A>(factor) + load_raw(bias + j + lanes<A>);
}

// m from the scores of the first keys. Finite, whatever they are.
template <class T, class Engine>
void AttendHead<T, Engine>::guess(A* m) const {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<A> low, high;
    logits(scores + i * kWide, 0, low, high);
    const A most = most_lane<A>(low > high ? low : high);
    m[i] = std::fabs(most) < static_cast<A>(1e30) ? most : 0;
  }
}

// P of rows [begin, end) of the scores of kWide keys from key j on, and their share of the sums.
template <class T, class Engine>
FASTAST_INLINE void AttendHead<T, Engine>::weigh(const A* s, int64_t j, const A* m, int64_t begin,
                                                 int64_t end, Element* to) {
  const Vec<A> factors = splat<A>(factor);
  const Vec<A> bias_low = load_raw(bias + j), bias_high = load_raw(bias + j + lanes<A>);
  A* const sum = sums;
  for (int64_t i = begin; i < end; ++i) {
    const Vec<A> less = splat<A>(m[i]);
    const Vec<A> low = load_raw(s + i * kWide) * factors + (bias_low - less);
    const Vec<A> high = load_raw(s + i * kWide + lanes<A>) * factors + (bias_high - less);
    const Vec<A> p_low = Engine::power(low);
    const Vec<A> p_high = Engine::power(high);
    store_raw(sum + i * lanes<A>, load_raw(sum + i * lanes<A>) + (p_low + p_high));
    Engine::put_weights(to + i * kPitch, p_low, p_high);
  }
}

template <class T, class Engine>
void AttendHead<T, Engine>::score(int64_t j, A* s) {
  for (int64_t c = 0; c < depth; c += kChunk)
    multiply_part<Engine, kPitch>(rows, p.n - j, query + query_at(c),
                                  keys + (j * depth + c * kWide) / kPair, kWide,
                                  depth - c < kChunk ? depth - c : kChunk, s, kWide, c > 0);
  // The half that was left out is weighed, too, with a bias of minus infinity.
  if (p.n - j <= kWide / 2)
    for (int64_t i = 0; i < rows; ++i) store_raw(s + i * kWide + lanes<A>, Vec<A>{});
}

// out = P V and sums, for logits less m, which is guessed unless it is known; not yet divided.
template <class T, class Engine>
void AttendHead<T, Engine>::attend(A* m, bool known) {
  A* const buffer[2] = {scores, scores + kRows * kWide};
  std::memset(sums, 0, sizeof(A) * kRows * lanes<A>);
  score(0, buffer[0]);
  if (!known) guess(m);
  for (int64_t j0 = 0; j0 < n; j0 += kChunk) {
    const int64_t end = j0 + kChunk < n ? j0 + kChunk : n;
    const int64_t last = end < n_values ? end : n_values;
    // The next scores are asked for before these are weighed: a processor works on both at once.
    for (int64_t j = j0; j < end; j += kWide) {
      if (j + kWide < n) score(j + kWide, buffer[(j / kWide + 1) % 2]);
      weigh(buffer[j / kWide % 2], j, m, 0, rows, weights + j % kChunk);
    }
    for (int64_t c = 0; c < width; c += kWide)
      multiply_part<Engine, kPitch>(rows, p.d - c, weights,
                                    values + (c * n_values + j0 * kWide) / kPair, kWide, last - j0,
                                    out + c, width, j0 > 0);
  }
}

// m as the largest logit of each row.
template <class T, class Engine>
void AttendHead<T, Engine>::largest(A* m) {
  Vec<A> most[kRows];
  for (Vec<A>& v : most) v = splat<A>(-INFINITY);
  for (int64_t j = 0; j < n; j += kWide) {
    score(j, scores);
    for (int64_t i = 0; i < rows; ++i) {
      Vec<A> low, high;
      logits(scores + i * kWide, j, low, high);
      most[i] = most[i] > low ? most[i] : low;
      most[i] = most[i] > high ? most[i] : high;
    }
  }
  for (int64_t i = 0; i < rows; ++i) m[i] = most_lane<A>(most[i]);
}

// Rows that are multiplied and not used must not be whatever was in memory: subnormal numbers take
// a hundred times as long, but for instructions of bf16.
template <class T, class Engine>
void AttendHead<T, Engine>::clear_unused() {
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  for (int64_t i = rows; i < kRows; ++i) {
    for (int64_t c = 0; c < depth; c += kChunk)
      std::memset(query + i * kPitch + query_at(c), 0, sizeof(Element) * least(depth - c, kChunk));
    std::memset(weights + i * kPitch, 0, sizeof(Element) * least(n, kChunk));
  }
}

template <class T, class Engine>
int64_t AttendHead<T, Engine>::rows_of(int64_t block) const {
  const int64_t left = p.n_q - block * kRows;
  return left < kRows ? left : kRows;
}

// The sum of row i's weights; whether m was near enough.
template <class T, class Engine>
FASTAST_INLINE bool AttendHead<T, Engine>::add_up(int64_t i, A& total) const {
  total = sum_lanes<A>(load_raw(sums + i * lanes<A>));
  return total > static_cast<A>(0x1p-64) && total < static_cast<A>(0x1p64);
}

// A row of O as the output of query i.
template <class T, class Engine>
FASTAST_INLINE void AttendHead<T, Engine>::write(int64_t b, int64_t h, int64_t i, const A* row,
                                                 A share) const {
  T* to = p.out + ((b * p.n_q + i) * p.heads + h) * p.d;
  for_each_pair<A>(
      p.d,
      [&](int64_t c, auto count) {
        Vec<A> v[count.value];
        for (int part = 0; part < count.value; ++part)
          v[part] = load_raw(row + c + part * lanes<A>) * splat<A>(share);
        store(to + c, v);
      },
      [&](int64_t c) { from_acc(row[c] * share, to + c); });
}

// A block of the queries of a head that is packed.
template <class T, class Engine>
void AttendHead<T, Engine>::block(int64_t b, int64_t h, int64_t at) {
  rows = rows_of(at);
  A m[kRows];
  for (int64_t i = 0; i < rows; ++i) load_query(b, h, at * kRows + i, query + i * kPitch);
  if constexpr (kPair == 1) clear_unused();
  A total[kRows];
  bool near = true;
  const auto add_up_all = [&] {
    for (int64_t i = 0; i < rows; ++i) near &= add_up(i, total[i]);
  };
  attend(m, false);
  add_up_all();
  if (!near) {
    largest(m);
    attend(m, true);
    add_up_all();
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t query = at * kRows + i;
    write(b, h, query, out + i * width, 1 / total[i]);
    if (p.lse)
      p.lse[(b * p.heads + h) * p.n_q + query] =
          m[i] / static_cast<A>(Engine::kUnit) + std::log(total[i]);
  }
}

template <class T, class Engine>
void AttendHead<T, Engine>::blocks(int64_t b, int64_t h, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) block(b, h, at);
}

// Blocks [begin, end) of all samples' heads' queries.
template <class T, class Engine>
void attend_blocks(const Attend<T>& p, int64_t begin, int64_t end, unsigned char* memory) {
  AttendHead<T, Engine> head(p, memory);
  const int64_t blocks = (p.n_q + Engine::kRows - 1) / Engine::kRows;  // of a head
  Engine::start();
  while (begin < end) {
    const int64_t at = begin / blocks, first = at * blocks;
    const int64_t last = first + blocks < end ? first + blocks : end;
    const int64_t b = at / p.heads, h = at % p.heads;
    head.pack(b, h);
    head.blocks(b, h, begin - first, last - first);
    begin = last;
  }
  Engine::stop();
}

template <class T, class Engine>
int64_t attend_memory(const Attend<T>& p) {
  return AttendHead<T, Engine>(p, nullptr).size;
}

template <class T, class Engine>
constexpr AttendKernel<T> attend_kernel() {
  return {Engine::kRows, attend_memory<T, Engine>, attend_blocks<T, Engine>};
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
