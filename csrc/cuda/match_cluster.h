// Bipartite matching, of a metric or of the keys of an attention, by a cluster of blocks a sample:
// one launch without scratch in memory, on GPUs whose blocks read each other's shared memory.
//
// The N tokens are cut into tiles of 64 of A (even) and the 64 of B (odd) between them; block i of
// the cluster owns the tiles i, i + blocks, ... Between the steps the whole cluster waits:
//
//   load    the own tiles into shared memory as fp32, as the mean over heads if there are heads,
//           and one over each token's length
//   match   the own tokens of A past every tile of B, read from the block that owns it: the best
//           partner of each, s_ij = a_i b_j / (|a_i| |b_j|) by tensor cores in three tf32 products
//   rank    the own tokens of A among all, by score, then by index; counts the unmerged of a tile
//   number  the own rows, and the own merged tokens into a list that the first block has
//
// The first block then writes the sources if asked for (sources.h). Bytes: H C values a token read
// once, in place; 4 N written, 12 with the sources. Between blocks of a cluster every token of B
// travels once to each block, and every score.
#pragma once

#include "match.h"

namespace fastast {

struct ClusterTile {
  float best[kTileA];
  int32_t partner[kTileA], rank[kTileA], n_kept;
};

// The shared memory of a block: for each own tile a ClusterTile and the tokens, each followed by
// one over its length (and padded by four banks); then 64 tokens of another block, all scores,
// counts of ranks, the unmerged of each tile.
struct ClusterShared {
  unsigned char* base;
  int pitch, own, tiles;

  static constexpr int kTile = (sizeof(ClusterTile) + 15) / 16 * 16;
  static int64_t bytes(int64_t c, int64_t own, int64_t tiles) {
    return own * (kTile + 2 * kTileA * (c + kPad) * 4) +
           (kTileB * (c + kPad) + tiles * (kTileA + 1) + kMatchThreads) * 4;
  }
  FASTAST_DEVICE unsigned char* at(int k) const {
    return base + static_cast<int64_t>(k) * (kTile + 2 * kTileA * pitch * 4);
  }
  FASTAST_DEVICE ClusterTile& tile(int k) const { return *reinterpret_cast<ClusterTile*>(at(k)); }
  FASTAST_DEVICE float* a(int k) const { return reinterpret_cast<float*>(at(k) + kTile); }
  FASTAST_DEVICE float* b(int k) const { return a(k) + kTileA * pitch; }
  FASTAST_DEVICE float* visitor() const { return reinterpret_cast<float*>(at(own)); }
  FASTAST_DEVICE float* keys() const { return visitor() + kTileB * pitch; }
  FASTAST_DEVICE int32_t* counts() const {
    return reinterpret_cast<int32_t*>(keys() + tiles * kTileA);
  }
  FASTAST_DEVICE int32_t* kept() const { return counts() + kMatchThreads; }
};

// The merged tokens of A, in the place of the scores when those have been ranked.
FASTAST_DEVICE int32_t* joined_of(const ClusterShared& s) {
  return reinterpret_cast<int32_t*>(s.keys());
}

FASTAST_DEVICE int tiles_of(const ClusterMatch& p) {
  return static_cast<int>((p.n + 2 * kTileA - 1) / (2 * kTileA));
}

FASTAST_DEVICE ClusterShared layout(const ClusterMatch& p, unsigned char* base) {
  const int tiles = tiles_of(p);
  return {base, static_cast<int>(p.c) + kPad, (tiles + p.blocks - 1) / p.blocks, tiles};
}

// `f(k, tile)` for each tile of a block: its place in the block and its number.
template <class F>
FASTAST_DEVICE void each_own(const ClusterShared& s, int block, int blocks, F f) {
  for (int tile = block, k = 0; tile < s.tiles; tile += blocks, ++k) f(k, tile);
}

template <class T>
FASTAST_DEVICE void cluster_load(MatchTeam& team, const ClusterMatch& p, int64_t b, int block,
                                 const ClusterShared& s) {
  constexpr int kPack = Pack<T>::kSize;
  const int packs = static_cast<int>(p.c) / kPack;
  const T* tokens = static_cast<const T*>(p.tokens) + b * p.sample;
  const float share = 1.0f / p.heads;
  each_own(s, block, p.blocks, [&](int k, int tile) {
    team.each([&](int i, MatchLane&) {
      for (int e = i; e < 2 * kTileA * packs; e += kMatchThreads) {
        const int at = e / packs, c = e % packs * kPack;
        const int64_t token = static_cast<int64_t>(tile) * 2 * kTileA + at;
        float sum[kPack] = {};
        if (token < p.n)
          for (int64_t h = 0; h < p.heads; ++h) {
            float v[kPack];
            load_pack(tokens + token * p.token + h * p.head + c, v);
            for (int x = 0; x < kPack; ++x) sum[x] += v[x];
          }
        for (int x = 0; x < kPack; ++x) sum[x] *= share;
        float* to = (at % 2 == 0 ? s.a(k) : s.b(k)) + at / 2 * s.pitch + c;
        for (int x = 0; x < kPack; x += 4) store_pack(sum + x, to + x);
      }
    });
    team.sync();
    team.each([&](int i, MatchLane&) {
      const int row = i % kTileA;
      float* values = (i < kTileA ? s.a(k) : s.b(k)) + row * s.pitch;
      float square = 0;
      for (int c = 0; c < p.c; c += 4) {
        float v[4];
        load_pack(values + c, v);
        for (int x = 0; x < 4; ++x) square += v[x] * v[x];
      }
      values[p.c] = inverse_length(square);
    });
  });
}

// `peer(block)` is the layout of another block's shared memory.
template <class Peer>
FASTAST_DEVICE void cluster_match(MatchTeam& team, const ClusterMatch& p, int block,
                                  const ClusterShared& s, Peer peer) {
  const int64_t nb = p.n / 2;
  const int c = static_cast<int>(p.c), quads = s.pitch / 4;
  each_own(s, block, p.blocks, [&](int k, int tile) {
    start_rows(team, p.distill_token);
    for (int from = 0; from < s.tiles; ++from) {
      const float* tokens = peer(from % p.blocks).b(from / p.blocks);
      team.sync();  // the visitor before has been read
      team.each([&](int i, MatchLane& lane) {
        for (int e = i; e < kTileB * quads; e += kMatchThreads) {
          const int at = e / quads * s.pitch + e % quads * 4;
          float v[4];
          load_pack(tokens + at, v);
          store_pack(v, s.visitor() + at);
        }
        for (int e = 0; e < kTileB / 2; ++e) lane.acc[e] = 0;
      });
      team.sync();
      for (int x = 0; x < c; x += 8) multiply_columns<true>(team, s.a(k), s.visitor(), s.pitch, x);
      keep_best(team, static_cast<int64_t>(from) * kTileB, nb, p.distill_token,
                [&](int column) { return s.visitor()[column * s.pitch + c]; });
    }
    ClusterTile& own = s.tile(k);
    each_best(team, [&](int row, float best, int32_t partner) {
      const int64_t a = static_cast<int64_t>(tile) * kTileA + row;
      own.best[row] = ranked(best * s.a(k)[row * s.pitch + c], a, p.class_token);
      own.partner[row] = partner;
    });
  });
}

template <class Peer>
FASTAST_DEVICE void cluster_rank(MatchTeam& team, const ClusterMatch& p, int block,
                                 const ClusterShared& s, Peer peer) {
  const int na = static_cast<int>((p.n + 1) / 2);
  team.each([&](int i, MatchLane&) {
    for (int j = i; j < na; j += kMatchThreads)
      s.keys()[j] = peer(j / kTileA % p.blocks).tile(j / kTileA / p.blocks).best[j % kTileA];
  });
  each_own(s, block, p.blocks, [&](int k, int tile) {
    team.sync();
    // Two threads a token count half of the others each.
    team.each([&](int thread, MatchLane&) {
      const int i = tile * kTileA + thread % kTileA, half = (na + 1) / 2;
      const int first = thread / kTileA * half, end = first + half < na ? first + half : na;
      int32_t before = 0;
      if (i < na) {
        const float mine = s.keys()[i];
        for (int j = first; j < end; ++j)
          before += s.keys()[j] > mine || (s.keys()[j] == mine && j < i);
      }
      s.counts()[thread] = before;
    });
    team.sync();
    team.each([&](int thread, MatchLane&) {
      if (thread >= kTileA) return;
      const bool inside = tile * kTileA + thread < na;
      s.tile(k).rank[thread] = inside ? s.counts()[thread] + s.counts()[thread + kTileA] : 0;
    });
    team.sync();
    team.each([&](int thread, MatchLane&) {
      if (thread != 0) return;
      int32_t kept = 0;
      for (int i = 0; i < kTileA && tile * kTileA + i < na; ++i) kept += s.tile(k).rank[i] >= p.r;
      s.tile(k).n_kept = kept;
    });
  });
}

template <class Peer>
FASTAST_DEVICE void cluster_number(MatchTeam& team, const ClusterMatch& p, int64_t b, int block,
                                   const ClusterShared& s, Peer peer) {
  const int64_t na = (p.n + 1) / 2;
  int32_t* joined = joined_of(peer(0));
  team.each([&](int i, MatchLane&) {
    for (int tile = i; tile < s.tiles; tile += kMatchThreads)
      s.kept()[tile] = peer(tile % p.blocks).tile(tile / p.blocks).n_kept;
  });
  team.sync();
  each_own(s, block, p.blocks, [&](int k, int tile) {
    team.each([&](int thread, MatchLane&) {
      const int64_t i = static_cast<int64_t>(tile) * kTileA + thread;
      if (thread >= kTileA || i >= na) return;
      const ClusterTile& own = s.tile(k);
      int32_t next = 0;
      for (int t = 0; t < tile; ++t) next += s.kept()[t];
      for (int t = 0; t < thread; ++t) next += own.rank[t] >= p.r;
      number(p, b, i, own.rank[thread], next, own.partner[thread], joined);
    });
  });
}

// By the first block, once the whole cluster has numbered.
FASTAST_DEVICE void cluster_sources(MatchTeam& team, const ClusterMatch& p, int64_t b, int block,
                                    const ClusterShared& s) {
  if (block == 0 && p.sources != nullptr) write_sources(team, p, b, joined_of(s), s.counts());
}

}  // namespace fastast
