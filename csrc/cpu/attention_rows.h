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
//
// An Engine has: Element (of P and Q) and Pair (what it multiplies kPair of at a time), kRows,
// kWide, kStep (the depth of a product is a multiple of it), and
//   power(x), kUnit                       exp(x / kUnit)
//   multiply(a, b, pitch, depth, c, c_pitch, add)  C (+)= A B for A [kRows, depth], rows kPitch
//                                         apart, B [depth / kPair, kWide] and C [kRows, kWide]
//   put(p, low, high)                     kWide fp32 values as Elements
//   start(), stop()                       around all work of a thread.
#include <cmath>
#include <initializer_list>
#include <utility>

#include "arena.h"
#include "lanes.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kPitch = kChunk + 32;  // not a power of two: rows must not share cache sets

FASTAST_INLINE Vec<float> polynomial(Vec<float> f, std::initializer_list<float> coefficients) {
  Vec<float> p = {};
  for (const float c : coefficients) p = p * f + splat<float>(c);
  return p;
}

#if FASTAST_VECTOR_BYTES == 64
// 2^x to 3e-6, for weights that are rounded to bf16: a polynomial of what x has beyond an integer.
FASTAST_INLINE Vec<float> power_of_two(Vec<float> x) {
  const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vec<float> p =
      polynomial((Vec<float>)f, {0.013534168f, 0.05201146f, 0.24144275f, 0.69300383f, 1.0000026f});
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)x);  // by the power that is no more than x
}
#endif

#if FASTAST_VECTOR_BYTES < 64
// max(bound, x) and min(bound, x); NaN stays NaN.
FASTAST_INLINE Vec<float> no_less(Vec<float> bound, Vec<float> x) {
#if FASTAST_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return x < bound ? bound : x;
#endif
}
FASTAST_INLINE Vec<float> no_more(Vec<float> bound, Vec<float> x) {
#if FASTAST_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_min_ps((__m256)bound, (__m256)x);
#else
  return x > bound ? bound : x;
#endif
}
#endif

// e^x to the accuracy of its type, by powers of two. 0 far below.
FASTAST_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> log2e = splat<float>(1.44269504f);
  const auto two_to_the = [](Vec<float> f) {  // from -1/2 to 1/2
    return polynomial(f, {0.00015345812f, 0.0013399931f, 0.0096184891f, 0.055503286f, 0.24022646f,
                          0.69314718f, 1.0f});
  };
#if FASTAST_VECTOR_BYTES == 64
  const __m512 n = _mm512_roundscale_ps((__m512)(x * log2e), _MM_FROUND_TO_NEAREST_INT);
  const Vec<float> f = x * log2e - (Vec<float>)n;
  const __mmask16 above = _mm512_cmp_ps_mask(n, _mm512_set1_ps(-1e4f), _CMP_NLT_US);
  return (Vec<float>)_mm512_maskz_scalef_ps(above, (__m512)two_to_the(f), n);
#else
  x = no_more(splat<float>(88.0f), no_less(splat<float>(-88.0f), x));
  const Vec<float> magic = splat<float>(0x1.8p23f + 127);
  // The nearest integer, and the bias of fp32's exponent, in the low bits.
  const Vec<float> shifted = x * log2e + magic;
  const Vec<float> f = x * log2e - (shifted - magic);
  return two_to_the(f) * (Vec<float>)((Words)shifted << 23);
#endif
}
FASTAST_INLINE Vec<double> exponential(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Products of single elements by multiply-adds: fp32 and fp64, and what is converted to them.
template <class A>
struct MultiplyAdd {
  using Element = A;
  using Pair = A;
  static constexpr int64_t kRows = FASTAST_TILE_ROWS, kWide = 2 * lanes<A>, kPair = 1, kStep = 1;
  static constexpr double kUnit = 1;
  static FASTAST_INLINE Vec<A> power(Vec<A> x) { return exponential(x); }

  static void multiply(const A* a, const A* b, int64_t pitch, int64_t depth, A* c, int64_t c_pitch,
                       bool add) {
    Vec<A> sum[kRows][2];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v) sum[i][v] = Vec<A>{};
    for (int64_t k = 0; k < depth; ++k) {
      const Vec<A> first = load_raw(b + k * pitch), second = load_raw(b + k * pitch + lanes<A>);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kRows; ++i) {
        const Vec<A> value = splat<A>(a[i * kPitch + k]);
        sum[i][0] += value * first;
        sum[i][1] += value * second;
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v) {
        // Added to C at last: shorter sums round less.
        A* to = c + i * c_pitch + v * lanes<A>;
        store_raw(to, add ? load_raw(to) + sum[i][v] : sum[i][v]);
      }
  }

  static FASTAST_INLINE void put(A* p, Vec<A> low, Vec<A> high) {
    store_raw(p, low);
    store_raw(p + lanes<A>, high);
  }
  static void start() {}
  static void stop() {}
};

// A vector of Pairs from element c of a row of d, zero beyond: of K two dims of a key share a lane,
// of V the same dim of two tokens will, so that there a lane holds one.
template <class T, class A>
FASTAST_INLINE Vec<A> load_keys(const T* row, int64_t c, int64_t d, A*) {
  if (c + lanes<A> <= d) return load(row + c);
  Vec<A> v = {};
  for (int64_t i = 0; i < lanes<A> && c + i < d; ++i) v[i] = to_acc(row[c + i]);
  return v;
}
template <class T, class A>
FASTAST_INLINE Vec<A> load_values(const T* row, int64_t c, int64_t d, A* of) {
  return load_keys(row, c, d, of);
}
// Asks for the row of a token to come. Tokens of one head lie too far apart for the hardware to
// guess.
template <class T>
FASTAST_INLINE void prefetch(const T* tokens, int64_t i, int64_t n, int64_t stride, int64_t d) {
  if (i >= n) return;
  const char* row = reinterpret_cast<const char*>(tokens + i * stride);
  for (int64_t c = 0; c < d * static_cast<int64_t>(sizeof(T)); c += 64) __builtin_prefetch(row + c);
}

template <class V>
FASTAST_INLINE V load_bits(const bf16* row, int64_t count) {
  V v = {};
  if (count >= static_cast<int64_t>(sizeof(V) / 2))
    std::memcpy(&v, row, sizeof v);
  else if (count > 0)
    std::memcpy(&v, row, static_cast<size_t>(count) * 2);
  return v;
}
FASTAST_INLINE Words load_keys(const bf16* row, int64_t c, int64_t d, uint32_t*) {
  return load_bits<Words>(row + c, d - c);
}
FASTAST_INLINE Words load_values(const bf16* row, int64_t c, int64_t d, uint32_t*) {
  return widen(load_bits<Halves>(row + c, d - c));
}

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
        depth(up_to(p.d, Engine::kStep)),
        width(up_to(p.d, kWide)) {
    Arena arena(memory);
    keys = arena.template take<Pair>(n * depth / kPair);
    values = arena.template take<Pair>(n * width / kPair);
    bias = arena.template take<A>(n);
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
  void block(int64_t b, int64_t h, int64_t i0);
  int64_t size;  // bytes of memory

 private:
  static constexpr int64_t L = kWide / 2;  // lanes of a vector of Pairs
  using V = decltype(load_keys(static_cast<const T*>(nullptr), 0, 0, static_cast<Pair*>(nullptr)));

  template <bool inside>
  void pack_keys(const T* k, int64_t j0);
  template <bool inside>
  void pack_values(const T* v, int64_t j);
  void load_query(const T* row, Element* to) const;
  void logits(const A* s, int64_t j, Vec<A>& low, Vec<A>& high) const;
  void guess(A* m) const;
  void score(int64_t j, A* s);
  void weigh(const A* s, int64_t j, const A* m, int64_t begin, int64_t end, Element* to);
  void attend(A* m, bool known);
  void largest(A* m);

  const Attend<T>& p;
  const int64_t n, depth, width;  // padded
  Pair *keys, *values;
  A* bias;  // of the logits; minus infinity beyond the last key
  Element *query, *weights;
  A *scores, *sums, *out;
  const A factor = static_cast<A>(p.scale * Engine::kUnit);
};

// Packs L keys from j0 on; `inside`: all of them are there, in whole vectors.
template <class T, class Engine>
template <bool inside>
FASTAST_INLINE void AttendHead<T, Engine>::pack_keys(const T* k, int64_t j0) {
  const int64_t pairs = depth / kPair;
  Pair* panel = keys + j0 / kWide * kWide * pairs + j0 % kWide;
  for (int64_t c = 0; c < pairs; c += L) {
    V block[L];
#pragma GCC unroll 16
    for (int64_t j = 0; j < L; ++j)
      block[j] = inside || j0 + j < p.n
                     ? load_keys(k + (j0 + j) * p.k_token, c * kPair, inside ? depth : p.d, keys)
                     : V{};
    transpose(block, Lanes<L>());
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i)
      if (c + i < pairs) std::memcpy(panel + (c + i) * kWide, &block[i], sizeof(V));
  }
}

// Packs the values of kPair tokens from j on; `inside` likewise.
template <class T, class Engine>
template <bool inside>
FASTAST_INLINE void AttendHead<T, Engine>::pack_values(const T* v, int64_t j) {
  Pair* to = values + j / kPair * width;
  const int64_t d = inside ? width : p.d;
  for (int64_t c = 0; c < width; c += L) {
    V pair = inside || j < p.n ? load_values(v + j * p.v_token, c, d, keys) : V{};
    if constexpr (kPair == 2)
      if (inside || j + 1 < p.n) pair |= load_values(v + (j + 1) * p.v_token, c, d, keys) << 16;
    std::memcpy(to + c, &pair, sizeof pair);
  }
}

template <class T, class Engine>
void AttendHead<T, Engine>::pack(int64_t b, int64_t h) {
  const T* k = p.k + b * p.k_sample + h * p.k_head;
  const T* v = p.v + b * p.v_sample + h * p.v_head;
  // The usual case, all in whole vectors, is compiled without the others' questions.
  const bool whole_keys = p.d == depth && p.d % (L * kPair) == 0, whole_values = p.d == width;
  constexpr int64_t kAhead = 32;
  for (int64_t j = 0; j < n; j += L) {
    for (int64_t i = 0; i < L; ++i) prefetch(k, j + kAhead + i, p.n, p.k_token, p.d);
    if (whole_keys && j + L <= p.n)
      pack_keys<true>(k, j);
    else
      pack_keys<false>(k, j);
  }
  for (int64_t j = 0; j < n; j += kPair) {
    for (int64_t i = 0; i < kPair; ++i) prefetch(v, j + kAhead + i, p.n, p.v_token, p.d);
    if (whole_values && j + kPair <= p.n)
      pack_values<true>(v, j);
    else
      pack_values<false>(v, j);
  }
  // The queries' dims beyond the last will be multiplied by zeros; garbage may not be.
  if (depth > p.d) std::memset(query, 0, sizeof(Element) * query_size());
  for (int64_t j = 0; j < n; ++j) {
    bias[j] = j >= p.n ? -INFINITY : p.log_size == nullptr ? 0 : p.log_size[b * p.n + j];
    bias[j] *= static_cast<A>(Engine::kUnit);
  }
}

template <class T, class Engine>
void AttendHead<T, Engine>::load_query(const T* row, Element* to) const {
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
  for (int64_t i = 0; i < kRows; ++i) {
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
    Engine::put(to + i * kPitch, p_low, p_high);
  }
}

template <class T, class Engine>
void AttendHead<T, Engine>::score(int64_t j, A* s) {
  for (int64_t c = 0; c < depth; c += kChunk)
    Engine::multiply(query + query_at(c), keys + (j * depth + c * kWide) / kPair, kWide,
                     depth - c < kChunk ? depth - c : kChunk, s, kWide, c > 0);
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
    // The next scores are asked for before these are weighed: a processor works on both at once.
    for (int64_t j = j0; j < end; j += kWide) {
      if (j + kWide < n) score(j + kWide, buffer[(j / kWide + 1) % 2]);
      weigh(buffer[j / kWide % 2], j, m, 0, kRows, weights + j % kChunk);
    }
    for (int64_t c = 0; c < width; c += kWide)
      Engine::multiply(weights, values + j0 / kPair * width + c, width, end - j0, out + c, width,
                       j0 > 0);
  }
}

// m as the largest logit of each row.
template <class T, class Engine>
void AttendHead<T, Engine>::largest(A* m) {
  Vec<A> most[kRows];
  for (Vec<A>& v : most) v = splat<A>(-INFINITY);
  for (int64_t j = 0; j < n; j += kWide) {
    score(j, scores);
    for (int64_t i = 0; i < kRows; ++i) {
      Vec<A> low, high;
      logits(scores + i * kWide, j, low, high);
      most[i] = most[i] > low ? most[i] : low;
      most[i] = most[i] > high ? most[i] : high;
    }
  }
  for (int64_t i = 0; i < kRows; ++i) m[i] = most_lane<A>(most[i]);
}

// Queries [i0, i0 + kRows) of a head that is packed.
template <class T, class Engine>
void AttendHead<T, Engine>::block(int64_t b, int64_t h, int64_t i0) {
  const int64_t rows = p.n_q - i0 < kRows ? p.n_q - i0 : kRows;
  const T* q = p.q + b * p.q_sample + h * p.q_head;
  A m[kRows];
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = q + (i0 + i) * p.q_token;
    prefetch(q, i0 + kRows + i, p.n_q, p.q_token, p.d);
    load_query(row, query + i * kPitch);
  }
  A total[kRows];
  bool lost = false;
  const auto add_up = [&] {
    for (int64_t i = 0; i < rows; ++i) {
      total[i] = sum_lanes<A>(load_raw(sums + i * lanes<A>));
      lost = lost || !(total[i] > static_cast<A>(0x1p-64) && total[i] < static_cast<A>(0x1p64));
    }
  };
  attend(m, false);
  add_up();
  if (lost) {
    largest(m);
    attend(m, true);
    add_up();
  }
  for (int64_t i = 0; i < rows; ++i) {
    const A share = 1 / total[i];
    T* to = p.out + ((b * p.n_q + i0 + i) * p.heads + h) * p.d;
    for_each_lane<A>(
        p.d, [&](int64_t c) { store(to + c, load_raw(out + i * width + c) * splat<A>(share)); },
        [&](int64_t c) { from_acc(out[i * width + c] * share, to + c); });
    p.lse[(b * p.heads + h) * p.n_q + i0 + i] =
        m[i] / static_cast<A>(Engine::kUnit) + std::log(total[i]);
  }
}

// Blocks [begin, end) of all samples' heads' queries.
template <class T, class Engine>
void attend_blocks(const Attend<T>& p, int64_t begin, int64_t end, unsigned char* memory) {
  AttendHead<T, Engine> head(p, memory);
  const int64_t blocks = (p.n_q + Engine::kRows - 1) / Engine::kRows;
  Engine::start();
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / blocks / p.heads, h = at / blocks % p.heads;
    if (at == begin || at % blocks == 0) head.pack(b, h);
    head.block(b, h, at % blocks * Engine::kRows);
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
