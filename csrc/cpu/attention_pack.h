// How attention and its backward lay out a head's tokens for an engine (attention_engine.h): copied
// once, from rows that lie apart in the packed qkv buffer to what products read in order. Padding
// is zero.
#pragma once

#include "arena.h"
#include "lanes.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

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

// The layouts of the n tokens of a head, `stride` elements apart, d values each; padded() of them.
template <class T, class Engine>
struct Packing {
  using A = Accumulate<T>;
  using Element = typename Engine::Element;
  using Pair = typename Engine::Pair;
  static constexpr int64_t kRows = Engine::kRows, kWide = Engine::kWide, kPair = Engine::kPair;
  static constexpr int64_t L = kWide / 2;  // lanes of a vector of Pairs
  using V = decltype(load_keys(static_cast<const T*>(nullptr), 0, 0, static_cast<Pair*>(nullptr)));

  const T* tokens;
  int64_t stride, n, d;

  void across(int64_t padded, int64_t depth, Pair* to) const;
  template <class Place>
  void down(int64_t padded, int64_t width, Pair* to, Place place) const;
  void down(int64_t padded, int64_t width, Pair* to) const {
    down(padded, width, to, [](int64_t j) { return j; });
  }
  void rows(int64_t padded, int64_t depth, Element* to) const;
  void turned(int64_t j0, int64_t count, int64_t rows, Element* to) const;

  // What lies on the left of a product has rows that are a fixed length apart: short ones, or
  // pieces of kPiece dims, each of all kRows tokens. A piece is as long as the forward's, so that
  // logits of fp32 come out with the same bits as those that the log-sum-exp is of.
  static constexpr int64_t kPiece = 256, kShort = 64, kLong = kPiece + kWide;
  static int64_t row_pitch(int64_t depth) { return depth <= kShort ? kShort : kLong; }
  static int64_t row_size(int64_t depth) {
    return up_to(depth, kPiece) / kPiece * row_pitch(depth);
  }
  static int64_t rows_size(int64_t padded, int64_t depth) { return padded * row_size(depth); }
  // Whole vectors of pairs, and no power of two: rows must not share cache sets.
  static constexpr int64_t turned_pitch(int64_t count) {
    return (count + L * kPair - 1) / (L * kPair) * L * kPair + kWide;
  }

 private:
  static constexpr int64_t kAhead = 32;
  template <bool inside>
  void across(int64_t j0, int64_t depth, Pair* to) const;
  template <bool inside>
  V pair(int64_t j, int64_t c, int64_t width) const;
};

// L tokens from j0 on; `inside`: all of them are there, in whole vectors.
template <class T, class Engine>
template <bool inside>
FASTAST_INLINE void Packing<T, Engine>::across(int64_t j0, int64_t depth, Pair* to) const {
  const int64_t pairs = depth / kPair;
  Pair* panel = to + j0 / kWide * kWide * pairs + j0 % kWide;
  for (int64_t c = 0; c < pairs; c += L) {
    V block[L];
#pragma GCC unroll 16
    for (int64_t j = 0; j < L; ++j)
      block[j] = inside || j0 + j < n
                     ? load_keys(tokens + (j0 + j) * stride, c * kPair, inside ? depth : d, to)
                     : V{};
    transpose(block, Lanes<L>());
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i)
      if (c + i < pairs) std::memcpy(panel + (c + i) * kWide, &block[i], sizeof(V));
  }
}

// [padded / kWide, depth / kPair, kWide]: a Pair is of dims that follow each other.
template <class T, class Engine>
void Packing<T, Engine>::across(int64_t padded, int64_t depth, Pair* to) const {
  // The usual case, all in whole vectors, is compiled without the others' questions.
  const bool whole = d == depth && d % (L * kPair) == 0;
  for (int64_t j = 0; j < padded; j += L) {
    for (int64_t i = 0; i < L; ++i) prefetch(tokens, j + kAhead + i, n, stride, d);
    if (whole && j + L <= n)
      across<true>(j, depth, to);
    else
      across<false>(j, depth, to);
  }
}

// Dims from c on of the kPair tokens from j on; `inside` likewise.
template <class T, class Engine>
template <bool inside>
FASTAST_INLINE auto Packing<T, Engine>::pair(int64_t j, int64_t c, int64_t width) const -> V {
  Pair* const of = nullptr;
  const int64_t dims = inside ? width : d;
  V pair = inside || j < n ? load_values(tokens + j * stride, c, dims, of) : V{};
  if constexpr (kPair == 2)
    if (inside || j + 1 < n) pair |= load_values(tokens + (j + 1) * stride, c, dims, of) << 16;
  return pair;
}

// [width / kWide, padded / kPair, kWide]: a Pair is of tokens that follow each other, token j at
// place(j), kPair of them beside each other.
template <class T, class Engine>
template <class Place>
void Packing<T, Engine>::down(int64_t padded, int64_t width, Pair* to, Place place) const {
  const int64_t panel = padded / kPair * kWide;
  const auto put = [&](auto inside, int64_t j, Pair* row) {
    for (int64_t c = 0; c < width; c += kWide, row += panel) {
      if constexpr (std::is_same_v<T, Element> && kPair == 2 && decltype(inside)::value) {
        Engine::put_rows(row, tokens + j * stride + c, tokens + (j + 1) * stride + c);
      } else {
        for (int64_t half = 0; half < kWide; half += L) {
          const V v = pair<decltype(inside)::value>(j, c + half, width);
          std::memcpy(row + half, &v, sizeof v);
        }
      }
    }
  };
  for (int64_t j = 0; j < padded; j += kPair) {
    for (int64_t i = 0; i < kPair; ++i) prefetch(tokens, j + kAhead + i, n, stride, d);
    Pair* const row = to + place(j) / kPair * kWide;
    if (d == width && j + kPair <= n)
      put(std::true_type(), j, row);
    else
      put(std::false_type(), j, row);
  }
}

// [padded / kRows, pieces, kRows, row_pitch(depth)]: rows as they are.
template <class T, class Engine>
void Packing<T, Engine>::rows(int64_t padded, int64_t depth, Element* to) const {
  const int64_t pitch = row_pitch(depth);
  for (int64_t j = 0; j < padded; ++j) {
    prefetch(tokens, j + kAhead, n, stride, d);
    Element* strip = to + j / kRows * kRows * row_size(depth) + j % kRows * pitch;
    const T* row = tokens + j * stride;
    const auto at = [&](int64_t c) { return strip + c / kPiece * pitch * kRows + c % kPiece; };
    if (j >= n || d < depth)
      for (int64_t c = 0; c < depth; c += kPiece) std::memset(at(c), 0, pitch * sizeof(Element));
    if (j >= n) continue;
    for_each_lane<A>(
        d,
        [&](int64_t c) {
          if constexpr (std::is_same_v<T, Element>)
            std::memcpy(at(c), row + c, lanes<A> * sizeof(T));
          else
            store_raw(at(c), load(row + c));
        },
        [&](int64_t c) {
          if constexpr (std::is_same_v<T, Element>)
            *at(c) = row[c];
          else
            *at(c) = to_acc(row[c]);
        });
  }
}

// [rows, turned_pitch(count)]: a row for each dim, of the tokens [j0, j0 + count).
template <class T, class Engine>
void Packing<T, Engine>::turned(int64_t j0, int64_t count, int64_t rows, Element* to) const {
  const auto turn = [&](auto inside, int64_t j, int64_t c) {
    V block[L];
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i)
      block[i] = pair<decltype(inside)::value>(j0 + j + i * kPair, c, c + L);
    transpose(block, Lanes<L>());
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i)
      if (decltype(inside)::value || c + i < rows)
        std::memcpy(to + (c + i) * turned_pitch(count) + j, &block[i], sizeof(V));
  };
  for (int64_t j = 0; j < count && j0 + j < up_to(n, kRows); j += L * kPair)
    for (int64_t c = 0; c < rows; c += L)
      if (j0 + j + L * kPair <= n && c + L <= d)
        turn(std::true_type(), j, c);
      else
        turn(std::false_type(), j, c);
}

// The sum of the products of two rows of d.
template <class T>
FASTAST_INLINE Accumulate<T> dot(const T* a, const T* b, int64_t d) {
  using A = Accumulate<T>;
  Vec<A> sums = {};
  A sum = 0;
  for_each_lane<A>(
      d, [&](int64_t c) { sums += load(a + c) * load(b + c); },
      [&](int64_t c) { sum += to_acc(a[c]) * to_acc(b[c]); });
  return sum_lanes<A>(sums) + sum;
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
