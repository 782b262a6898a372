// Bipartite matching in one launch: best partners, the r best pairs, output rows. Where blocks form
// clusters, match_cluster.h has a faster form, made of the same parts.
//
// A block takes 64 tokens of A (even tokens) of one sample past all of B (odd tokens), 64 at a
// time: s_ij = a_i b_j / (|a_i| |b_j|) by tensor cores, of which it keeps the best of each row and
// its lowest column. fp32 is multiplied in three tf32 products, to fp32 accuracy; bf16 and fp16 fit
// into tf32 as they are. The block of a sample that arrives last then ranks the tokens of A (by
// score, then by index; counted, not sorted), merges the first r, numbers the rows, and if asked
// for lists the tokens of each (sources.h). What it reads was written by blocks that have passed a
// fence. Bytes: N C values read once from memory and ceil(N / 128) times from the L2 cache, 4 N
// written (12 with the sources), and 12 a token of A of scratch.
#pragma once

#include <cmath>

#include "match_params.h"
#include "pack.h"
#include "sources.h"

namespace fastast {

constexpr int kTileA = 64, kTileB = 64, kChunk = 32, kPad = 4;
constexpr int kMatchWarps = kTileA / 16;
constexpr int kMatchThreads = kMatchWarps * kWarp;
constexpr int kKeys = 1024;

struct MatchLane : SourcesLane {
  float acc[kTileB / 2];  // two rows by two columns of each eight
  float a[4], a_low[4], b[2], b_low[2];
  float best[2], at[2];  // of the two rows, and the column, which fp32 holds exactly
  float moved, moved_at;
};

struct MatchShared {
  float a[kTileA][kChunk + kPad], b[kTileB][kChunk + kPad];
  float square_a[kTileA], square_b[kTileB];
  float keys[kKeys];
  int32_t targets[kMatchThreads];
  bool last;
};

using MatchTeam = Team<MatchLane, kMatchWarps>;

// The part of x that tf32 holds, rounded to nearest.
FASTAST_DEVICE float to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits >> 23 & 0xff) != 0xff) bits = (bits + 0x1000) & ~0x1fffu;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// acc[4 tile ..] += a b of a warp, 16 x 8 by 8 x 8: lane 4 g + t holds rows g and g + 8, columns t
// and t + 4 of a; rows t and t + 4, column g of b; rows g and g + 8, columns 2 t and 2 t + 1 of the
// sum.
FASTAST_DEVICE void multiply(MatchTeam& team, float (MatchLane::*a)[4], float (MatchLane::*b)[2],
                             int tile) {
#ifdef __CUDACC__
  float *c = team.own.acc + 4 * tile, *x = team.own.*a, *y = team.own.*b;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(x[0])), "r"(__float_as_uint(x[1])), "r"(__float_as_uint(x[2])),
        "r"(__float_as_uint(x[3])), "r"(__float_as_uint(y[0])), "r"(__float_as_uint(y[1])));
#else
  for (int warp = 0; warp < kMatchWarps; ++warp) {
    MatchLane* lanes = team.lanes + warp * kWarp;
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        const int g = row % 8, upper = row / 8;
        float sum = 0;
        for (int k = 0; k < 8; ++k)
          sum +=
              (lanes[4 * g + k % 4].*a)[upper + k / 4 * 2] * (lanes[4 * column + k % 4].*b)[k / 4];
        lanes[4 * g + column / 2].acc[4 * tile + 2 * upper + column % 2] += sum;
      }
  }
#endif
}

// 64 tokens, every second from `first`, and 32 of their columns; zero outside.
template <class T>
FASTAST_DEVICE void load_chunk(const Match& p, int64_t b, int64_t first, int64_t tokens, int64_t c0,
                               int thread, float (*to)[kChunk + kPad]) {
  const T* metric = static_cast<const T*>(p.metric) + b * p.sample;
  for (int k = thread; k < kTileA * kChunk; k += kMatchThreads) {
    const int64_t row = k / kChunk, c = c0 + k % kChunk;
    const bool inside = row < tokens && c < p.c;
    to[row][k % kChunk] = inside ? to_float(metric[(first + 2 * row) * p.token + c]) : 0.0f;
  }
}

// A value that another block has written: from the L2 cache, where all blocks see the same.
template <class T>
FASTAST_DEVICE T written_elsewhere(const T* p) {
#ifdef __CUDACC__
  return __ldcg(p);
#else
  return *p;
#endif
}

FASTAST_DEVICE float inverse_length(float square) { return 1 / fmaxf(sqrtf(square), 1e-12f); }

// acc += a b' of eight columns from k on; `a` and `b` are 64 rows of a given pitch.
template <bool kSplit>
FASTAST_DEVICE void multiply_columns(MatchTeam& team, const float* a, const float* b, int pitch,
                                     int k) {
  team.each([&](int i, MatchLane& lane) {
    const int g = i % kWarp / 4, t = i % 4, row = i / kWarp * 16 + g;
    for (int e = 0; e < 4; ++e) {
      const float value = a[(row + e % 2 * 8) * pitch + k + t + e / 2 * 4];
      lane.a[e] = kSplit ? to_tf32(value) : value;
      if (kSplit) lane.a_low[e] = to_tf32(value - lane.a[e]);
    }
  });
#pragma unroll
  for (int n = 0; n < kTileB / 8; ++n) {
    team.each([&](int i, MatchLane& lane) {
      const int g = i % kWarp / 4, t = i % 4;
      for (int e = 0; e < 2; ++e) {
        const float value = b[(n * 8 + g) * pitch + k + t + e * 4];
        lane.b[e] = kSplit ? to_tf32(value) : value;
        if (kSplit) lane.b_low[e] = to_tf32(value - lane.b[e]);
      }
    });
    if (kSplit) {
      multiply(team, &MatchLane::a_low, &MatchLane::b, n);
      multiply(team, &MatchLane::a, &MatchLane::b_low, n);
    }
    multiply(team, &MatchLane::a, &MatchLane::b, n);
  }
}

// A token without any score, being not finite, is the partner of the first that may have one.
FASTAST_DEVICE void start_rows(MatchTeam& team, bool distill_token) {
  team.each([&](int, MatchLane& lane) {
    for (int k = 0; k < 2; ++k) lane.best[k] = -INFINITY, lane.at[k] = distill_token;
  });
}

// Keeps the best of the products with 64 tokens of B from j0 on, times inverse(column).
template <class F>
FASTAST_DEVICE void keep_best(MatchTeam& team, int64_t j0, int64_t nb, bool distill_token,
                              F inverse) {
  team.each([&](int i, MatchLane& lane) {
    const int t = i % 4;
#pragma unroll
    for (int n = 0; n < kTileB / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        const int column = n * 8 + 2 * t + e % 2;
        const int64_t j = j0 + column;
        if (j >= nb || (distill_token && j == 0)) continue;
        const float score = lane.acc[4 * n + e] * inverse(column);
        if (score > lane.best[e / 2]) lane.best[e / 2] = score, lane.at[e / 2] = j;
      }
  });
}

// f(row, best, partner) of each of the 64 rows, from the four lanes that hold it: the best of them,
// the lowest column among equals.
template <class F>
FASTAST_DEVICE void each_best(MatchTeam& team, F f) {
  for (int k = 0; k < 2; ++k)
    for (int step = 1; step < 4; step *= 2) {
      team.each([&](int, MatchLane& lane) {
        lane.moved = lane.best[k];
        lane.moved_at = lane.at[k];
      });
      team.move(&MatchLane::moved, &MatchLane::moved, [&](int i) { return i ^ step; });
      team.move(&MatchLane::moved_at, &MatchLane::moved_at, [&](int i) { return i ^ step; });
      team.each([&](int, MatchLane& lane) {
        const bool better =
            lane.moved > lane.best[k] || (lane.moved == lane.best[k] && lane.moved_at < lane.at[k]);
        if (better) lane.best[k] = lane.moved, lane.at[k] = lane.moved_at;
      });
    }
  team.each([&](int i, MatchLane& lane) {
    if (i % 4 != 0) return;
    for (int k = 0; k < 2; ++k)
      f(i / kWarp * 16 + i % kWarp / 4 + k * 8, lane.best[k], static_cast<int32_t>(lane.at[k]));
  });
}

// A score as it is ranked. NaN would break the ranking, and with it every row: such a token is not
// merged, and neither is CLS.
FASTAST_DEVICE float ranked(float score, int64_t a, bool class_token) {
  return score != score || (class_token && a == 0) ? -INFINITY : score;
}

// The output row of token i of A: `rank` among all of A, `next` unmerged ones before it.
FASTAST_DEVICE int32_t row_of_a(int32_t rank, int32_t next, int32_t partner, int64_t r,
                                int32_t n_kept, bool class_token, bool distill_token) {
  if (rank < r) return n_kept + partner;
  int32_t row = class_token ? next : rank - static_cast<int32_t>(r);
  if (distill_token && row > 0) ++row;  // row 1 is the first of B
  return row;
}

FASTAST_DEVICE int32_t row_of_b(int64_t i, int32_t n_kept, bool distill_token) {
  return distill_token && i == 0 ? 1 : n_kept + static_cast<int32_t>(i);
}

// The rows of token i of A and of token i of B, and what write_sources() needs to know of them:
// `joined` lists the merged tokens of A, and a row that nobody joins has its token.
template <class Params>
FASTAST_DEVICE void number(const Params& p, int64_t b, int64_t i, int32_t rank, int32_t next,
                           int32_t partner, int32_t* joined) {
  const int64_t na = (p.n + 1) / 2, nb = p.n / 2;
  const int32_t n_kept = static_cast<int32_t>(na - p.r);
  const int32_t of_a = row_of_a(rank, next, partner, p.r, n_kept, p.class_token, p.distill_token);
  int32_t* rows = p.rows + b * p.n;
  rows[2 * i] = of_a;
  if (i < nb) rows[2 * i + 1] = row_of_b(i, n_kept, p.distill_token);
  if (p.sources == nullptr) return;
  int32_t* tokens = MatchSources(p, b).tokens;
  if (rank < p.r)
    joined[i - next] = static_cast<int32_t>(i);
  else
    tokens[of_a] = static_cast<int32_t>(2 * i);
  if (p.distill_token && i == 0) tokens[1] = 1;
}

// The best partners of 64 tokens of A, into p.best and p.partner.
template <class T>
FASTAST_DEVICE void match_tile(MatchTeam& team, const Match& p, int64_t b, int64_t tile,
                               MatchShared& s) {
  constexpr bool kSplit = sizeof(T) == 4;
  const int64_t na = (p.n + 1) / 2, nb = p.n / 2, i0 = tile * kTileA;
  start_rows(team, p.distill_token);
  for (int64_t j0 = 0; j0 < nb; j0 += kTileB) {
    team.each([&](int i, MatchLane& lane) {
      for (int e = 0; e < kTileB / 2; ++e) lane.acc[e] = 0;
      if (i < kTileB) s.square_b[i] = 0;
      if (i < kTileA && j0 == 0) s.square_a[i] = 0;
    });
    for (int64_t c0 = 0; c0 < p.c; c0 += kChunk) {
      team.sync();  // the chunk before has been read
      team.each([&](int i, MatchLane&) {
        load_chunk<T>(p, b, 2 * i0, na - i0, c0, i, s.a);
        load_chunk<T>(p, b, 2 * j0 + 1, nb - j0, c0, i, s.b);
      });
      team.sync();
      team.each([&](int i, MatchLane&) {
        float (*rows)[kChunk + kPad] = i < kTileB ? s.b : s.a;
        const int row = i % kTileB;
        float square = 0;
        for (int k = 0; k < kChunk; ++k) square += rows[row][k] * rows[row][k];
        if (i < kTileB) s.square_b[row] += square;
        if (i >= kTileB && j0 == 0) s.square_a[row] += square;
      });
      for (int k = 0; k < kChunk; k += 8)
        multiply_columns<kSplit>(team, s.a[0], s.b[0], kChunk + kPad, k);
    }
    team.sync();  // the lengths are whole
    keep_best(team, j0, nb, p.distill_token,
              [&](int column) { return inverse_length(s.square_b[column]); });
    team.sync();  // the lengths have been read
  }
  each_best(team, [&](int row, float best, int32_t partner) {
    const int64_t a = i0 + row;
    if (a >= na) return;
    p.best[b * na + a] = ranked(best * inverse_length(s.square_a[row]), a, p.class_token);
    p.partner[b * na + a] = partner;
  });
}

// Nothing moves, not even DIST.
FASTAST_DEVICE void keep_rows(MatchTeam& team, const Match& p, int64_t b) {
  team.each([&](int i, MatchLane&) {
    for (int64_t j = i; j < p.n; j += kMatchThreads) {
      const int32_t row = static_cast<int32_t>(j);
      p.rows[b * p.n + j] = row;
      if (p.sources != nullptr) MatchSources(p, b).offsets[j] = MatchSources(p, b).tokens[j] = row;
    }
    if (i == 0 && p.sources != nullptr) MatchSources(p, b).offsets[p.n] = static_cast<int32_t>(p.n);
  });
}

// Ranks the tokens of A, numbers the output rows of a sample, and finds their tokens if asked for.
FASTAST_DEVICE void select_rows(MatchTeam& team, const Match& p, int64_t b, MatchShared& s) {
  if (p.r == 0) return keep_rows(team, p, b);
  const int64_t na = (p.n + 1) / 2;
  const float* best = p.best + b * na;
  int32_t* rank = p.rank + b * na;
  for (int64_t j0 = 0; j0 < na; j0 += kKeys) {
    const int count = static_cast<int>(na - j0 < kKeys ? na - j0 : kKeys);
    team.sync();
    team.each([&](int i, MatchLane&) {
      for (int j = i; j < count; j += kMatchThreads) s.keys[j] = written_elsewhere(best + j0 + j);
    });
    team.sync();
    team.each([&](int thread, MatchLane&) {
      for (int64_t i = thread; i < na; i += kMatchThreads) {
        const float mine = written_elsewhere(best + i);
        int32_t before = j0 == 0 ? 0 : rank[i];
        for (int j = 0; j < count; ++j)
          before += s.keys[j] > mine || (s.keys[j] == mine && j0 + j < i);
        rank[i] = before;
      }
    });
  }
  team.sync();
  // Each thread numbers a run of tokens, after counting the unmerged in it.
  const int64_t run = (na + kMatchThreads - 1) / kMatchThreads;
  team.each([&](int thread, MatchLane& lane) {
    lane.count = 0;
    for (int64_t i = thread * run; i < (thread + 1) * run && i < na; ++i)
      lane.count += rank[i] >= p.r;
  });
  team.sum_before(&MatchLane::count, &MatchLane::before);
  int32_t* joined = reinterpret_cast<int32_t*>(p.best + b * na);  // the scores have done their part
  team.each([&](int thread, MatchLane& lane) {
    int32_t next = lane.before;
    for (int64_t i = thread * run; i < (thread + 1) * run && i < na; ++i) {
      number(p, b, i, rank[i], next, written_elsewhere(p.partner + b * na + i), joined);
      next += rank[i] >= p.r;
    }
  });
  if (p.sources != nullptr) write_sources(team, p, b, joined, s.targets);
}

}  // namespace fastast
