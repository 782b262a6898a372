// Rows of tokens on a GPU, one warp a row, or four for rows over 1024 values: merging, gathering,
// residual add, LayerNorm, and the backward of each.
//
//   reduce_row    h_i = sum_j s_j (x_j + residual_j) / S_i over the tokens j of row i, S_i = sum
//   s_j,
//                 log S_i, and y_i = LayerNorm(h_i). The team takes its tokens in ascending order
//                 from the sources (sources.h) or, without those, by scanning the sample's
//                 assignment, 128 at a time. Reads 2 N D, writes 2 N' D.
//   gather_row    out_j = w_j x_i of the row i of token j, w_j = 1 or s_j / S_i. Reads N' D,
//                 writes N D.
//   add_norm_row  h = x + residual, y = LayerNorm(h). Reads 2 N D, writes 2 N D.
//   norm_grad_run a run of tokens: dx_j = w_j (grad_h + rstd (g - mean(g) - xhat mean(g xhat)))
//   with
//                 g = grad_y weight, and the run's share of dweight and dbias, kept in shared
//                 memory. Rows are shared among their tokens by w_j, which add up to one; a row
//                 without tokens has a dbias only, added by the token of its number. Reads 3 N' D,
//                 writes N D.
//
// No atomics: the same bits every time. Sums are fp32. D is a multiple of 8 up to 4096; rows begin
// at multiples of 16 bytes, any stride between tokens and samples; assignment and sizes are dense.
#pragma once

#include <cmath>

#include "pack.h"
#include "rows_params.h"

namespace fastast {

constexpr float kTiny = 1.1754943508222875e-38f;

template <int kPerLane>
struct RowLane {
  float value[kPerLane];
  float part, other;
  uint32_t hits;
};

// Calls f(column, values) for each of a lane's packs that is inside the row.
template <class T, int kWarps, int kPerLane, class F>
FASTAST_DEVICE void each_pack(int lane, float (&value)[kPerLane], int64_t d, F f) {
#pragma unroll
  for (int k = 0; k < kPerLane / Pack<T>::kSize; ++k) {
    const int64_t c = static_cast<int64_t>(k * kWarps * kWarp + lane) * Pack<T>::kSize;
    if (c < d) f(c, value + k * Pack<T>::kSize);
  }
}

template <class T>
FASTAST_DEVICE const T* row_of(const Tokens& t, int64_t b, int64_t i) {
  return static_cast<const T*>(t.data) + b * t.sample + i * t.token;
}

template <class T, int kPerLane, int kWarps>
FASTAST_DEVICE void store_row(Team<RowLane<kPerLane>, kWarps>& team, int64_t d, T* out) {
  team.each([&](int i, RowLane<kPerLane>& lane) {
    each_pack<T, kWarps>(i, lane.value, d, [&](int64_t c, float* v) { store_pack(v, out + c); });
  });
}

// y = LayerNorm of the row that the team holds; row counts over all samples.
template <class T, int kPerLane, int kWarps>
FASTAST_DEVICE void norm_row(Team<RowLane<kPerLane>, kWarps>& team, const Norm& p, int64_t row,
                             int64_t d) {
  using Lane = RowLane<kPerLane>;
  constexpr int kPack = Pack<T>::kSize;
  team.each([&](int i, Lane& lane) {
    lane.part = 0;
    each_pack<T, kWarps>(i, lane.value, d, [&](int64_t, float* v) {
      for (int e = 0; e < kPack; ++e) lane.part += v[e];
    });
  });
  const float mean = team.sum(&Lane::part) / d;
  team.each([&](int i, Lane& lane) {
    lane.part = 0;
    each_pack<T, kWarps>(i, lane.value, d, [&](int64_t, float* v) {
      for (int e = 0; e < kPack; ++e) lane.part += (v[e] - mean) * (v[e] - mean);
    });
  });
  const float rstd = 1 / sqrtf(team.sum(&Lane::part) / d + p.eps);
  T* y = static_cast<T*>(p.y) + row * d;
  team.each([&](int i, Lane& lane) {
    each_pack<T, kWarps>(i, lane.value, d, [&](int64_t c, float* v) {
      float w[kPack], out[kPack];
      load_floats(p.weight + c, w);
      load_floats(p.bias + c, out);
      for (int e = 0; e < kPack; ++e) out[e] += (v[e] - mean) * rstd * w[e];
      store_pack(out, y + c);
    });
    if (i == 0) {
      p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
  });
}

// f(j) for each token of a row of sample b, ascending.
template <int kPerLane, int kWarps, class F>
FASTAST_DEVICE void each_source(Team<RowLane<kPerLane>, kWarps>& team, const ReduceRows& p,
                                int64_t b, int32_t row, F f) {
  using Lane = RowLane<kPerLane>;
  const int32_t* assignment = p.assignment + b * p.n;
  for (int64_t start = 0; start < p.n; start += 4 * kWarp) {
    team.each([&](int i, Lane& lane) {
      lane.hits = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t j = start + k * kWarp + i % kWarp;  // every warp of the team looks at all
        if (j < p.n && assignment[j] == row) lane.hits |= 1u << k;
      }
    });
#pragma unroll
    for (int k = 0; k < 4; ++k)
      for (uint32_t mask = team.ballot(&Lane::hits, k); mask != 0; mask &= mask - 1)
        f(start + k * kWarp + lowest_bit(mask));
  }
}

// What points outside of the sample is left out, as it is in an assignment.
template <int kPerLane, int kWarps, class F>
FASTAST_DEVICE void each_source(Team<RowLane<kPerLane>, kWarps>&, const ReduceListedRows& p,
                                int64_t b, int32_t row, F f) {
  const int32_t* offsets = p.sources + b * (p.n_out + 1 + p.n);
  const int32_t* tokens = offsets + p.n_out + 1;
  const int32_t n = static_cast<int32_t>(p.n);
  const int32_t first = offsets[row] < 0 ? 0 : offsets[row];
  const int32_t end = offsets[row + 1] < n ? offsets[row + 1] : n;
#pragma unroll 1  // most rows have one token, and registers are short
  for (int32_t k = first; k < end; ++k) {
    const int32_t j = tokens[k];
    if (j >= 0 && j < n) f(j);
  }
}

template <class T, int kPerLane, int kWarps, class Params>
FASTAST_DEVICE void reduce_row(Team<RowLane<kPerLane>, kWarps>& team, const Params& p,
                               int64_t i_out) {
  using Lane = RowLane<kPerLane>;
  constexpr int kPack = Pack<T>::kSize;
  const int64_t b = i_out / p.n_out;
  const int32_t row = static_cast<int32_t>(i_out % p.n_out);
  float total = 0;
  team.each([](int, Lane& lane) {
    for (int e = 0; e < kPerLane; ++e) lane.value[e] = 0;
  });
  each_source(team, p, b, row, [&](int64_t j) {
    const float s = p.size == nullptr ? 1.0f : p.size[b * p.n + j];
    total += s;
    // A running mean: a token that stays alone comes out exactly as it went in.
    const float share = s / fmaxf(total, kTiny);
    team.each([&](int i, Lane& lane) {
      each_pack<T, kWarps>(i, lane.value, p.d, [&](int64_t c, float* v) {
        float x[kPack], r[kPack];
        load_pack(row_of<T>(p.x, b, j) + c, x);
        if (p.residual.data != nullptr) {
          load_pack(row_of<T>(p.residual, b, j) + c, r);
          for (int e = 0; e < kPack; ++e) x[e] += r[e];
        }
        for (int e = 0; e < kPack; ++e) v[e] += p.mean ? (x[e] - v[e]) * share : x[e];
      });
    });
  });
  store_row<T>(team, p.d, static_cast<T*>(p.h) + i_out * p.d);
  team.each([&](int i, Lane&) {
    if (i == 0 && p.size_out != nullptr) p.size_out[i_out] = total;
    if (i == 0 && p.log_size_out != nullptr) p.log_size_out[i_out] = logf(total);
  });
  if (p.norm.weight != nullptr) norm_row<T>(team, p.norm, i_out, p.d);
}

template <class T, int kPerLane, int kWarps>
FASTAST_DEVICE void gather_row(Team<RowLane<kPerLane>, kWarps>& team, const GatherRows& p,
                               int64_t j) {
  using Lane = RowLane<kPerLane>;
  constexpr int kPack = Pack<T>::kSize;
  const int64_t b = j / p.n;
  const int32_t row = p.assignment[j];
  const bool kept = row >= 0 && row < p.n_out;
  float w = 1;
  if (kept && p.size_out != nullptr)
    w = (p.size == nullptr ? 1.0f : p.size[j]) / fmaxf(p.size_out[b * p.n_out + row], kTiny);
  team.each([&](int i, Lane& lane) {
    each_pack<T, kWarps>(i, lane.value, p.d, [&](int64_t c, float* v) {
      for (int e = 0; e < kPack; ++e) v[e] = 0;
      if (kept) load_pack(row_of<T>(p.x, b, row) + c, v);
      for (int e = 0; e < kPack; ++e) v[e] *= w;
    });
  });
  store_row<T>(team, p.d, static_cast<T*>(p.out) + j * p.d);
}

template <class T, int kPerLane, int kWarps>
FASTAST_DEVICE void add_norm_row(Team<RowLane<kPerLane>, kWarps>& team, const AddNormRows& p,
                                 int64_t i) {
  using Lane = RowLane<kPerLane>;
  constexpr int kPack = Pack<T>::kSize;
  const T* x = row_of<T>(p.x, i / p.n, i % p.n);
  const T* residual = row_of<T>(p.residual, i / p.n, i % p.n);
  team.each([&](int l, Lane& lane) {
    each_pack<T, kWarps>(l, lane.value, p.d, [&](int64_t c, float* v) {
      float r[kPack];
      load_pack(x + c, v);
      load_pack(residual + c, r);
      for (int e = 0; e < kPack; ++e) v[e] += r[e];
    });
  });
  store_row<T>(team, p.d, static_cast<T*>(p.h) + i * p.d);
  norm_row<T>(team, p.norm, i, p.d);
}

// `sums` is 2 D floats that only this team uses: dweight, then dbias.
template <class T, int kPerLane, int kWarps>
FASTAST_DEVICE void norm_grad_run(Team<RowLane<kPerLane>, kWarps>& team, const NormGradRuns& p,
                                  int64_t i_run, float* sums) {
  using Lane = RowLane<kPerLane>;
  constexpr int kPack = Pack<T>::kSize;
  const T *grad_h = static_cast<const T*>(p.grad_h), *grad_y = static_cast<const T*>(p.grad_y),
          *h = static_cast<const T*>(p.h);
  team.each([&](int i, Lane& lane) {
    each_pack<T, kWarps>(i, lane.value, p.d, [&](int64_t c, float*) {
      for (int e = 0; e < kPack; ++e) sums[c + e] = sums[p.d + c + e] = 0;
    });
  });
  const int64_t tokens = p.batch * p.n;
  const int64_t end = (i_run + 1) * p.run < tokens ? (i_run + 1) * p.run : tokens;
  for (int64_t j = i_run * p.run; j < end; ++j) {
    int64_t row = j;
    float share = 1;
    bool kept = true;
    if (p.assignment != nullptr) {
      const int64_t b = j / p.n, i = j % p.n;
      const int32_t to = p.assignment[j];
      kept = to >= 0 && to < p.n_out;
      row = b * p.n_out + to;
      if (kept) {
        share = p.size == nullptr ? 1.0f : p.size[j];
        share /= fmaxf(p.size_out[row], kTiny);
      }
      if (i < p.n_out && p.size_out[b * p.n_out + i] == 0) {  // the row of this number is empty
        team.each([&](int l, Lane& lane) {
          each_pack<T, kWarps>(l, lane.value, p.d, [&](int64_t c, float* v) {
            load_pack(grad_y + (b * p.n_out + i) * p.d + c, v);
            for (int e = 0; e < kPack; ++e) sums[p.d + c + e] += v[e];
          });
        });
      }
    }
    if (!kept) {
      team.each([&](int l, Lane& lane) {
        for (int e = 0; e < kPerLane; ++e) lane.value[e] = 0;
        each_pack<T, kWarps>(l, lane.value, p.d, [&](int64_t c, float* v) {
          store_pack(v, static_cast<T*>(p.dx) + j * p.d + c);
        });
      });
      continue;
    }
    const float mean = p.mean[row], rstd = p.rstd[row];
    team.each([&](int l, Lane& lane) {
      lane.part = lane.other = 0;
      each_pack<T, kWarps>(l, lane.value, p.d, [&](int64_t c, float* v) {
        float gy[kPack], w[kPack];
        load_floats(p.weight + c, w);
        load_pack(h + row * p.d + c, v);
        load_pack(grad_y + row * p.d + c, gy);
        for (int e = 0; e < kPack; ++e) {
          v[e] = (v[e] - mean) * rstd;  // xhat stays in the registers
          const float g = gy[e] * w[e];
          lane.part += g;
          lane.other += g * v[e];
          sums[c + e] += share * gy[e] * v[e];
          sums[p.d + c + e] += share * gy[e];
        }
      });
    });
    const float constant = team.sum(&Lane::part) / p.d, along = team.sum(&Lane::other) / p.d;
    team.each([&](int l, Lane& lane) {
      each_pack<T, kWarps>(l, lane.value, p.d, [&](int64_t c, float* v) {
        float gy[kPack], gh[kPack], w[kPack];
        load_floats(p.weight + c, w);
        load_pack(grad_y + row * p.d + c, gy);  // once more, from the L1 cache
        load_pack(grad_h + row * p.d + c, gh);
        for (int e = 0; e < kPack; ++e) {
          const float g = gy[e] * w[e];
          v[e] = share * (gh[e] + rstd * (g - constant - v[e] * along));
        }
        store_pack(v, static_cast<T*>(p.dx) + j * p.d + c);
      });
    });
  }
  team.each([&](int i, Lane& lane) {
    each_pack<T, kWarps>(i, lane.value, p.d, [&](int64_t c, float*) {
      for (int e = 0; e < kPack; e += 4) {
        store_pack(sums + c + e, p.dweight + i_run * p.d + c + e);
        store_pack(sums + p.d + c + e, p.dbias + i_run * p.d + c + e);
      }
    });
  });
}

}  // namespace fastast
