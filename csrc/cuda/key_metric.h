// The mean of the keys over heads at unit length, one warp a token.
//
//   out_c = m_c / max(|m|, 1e-12),  m_c = 1/H sum_h k_hc
//
// The lanes of a warp are cut into groups that are one head wide, 16 bytes a lane; each group sums
// every so many heads, and the groups add up in order: the same bits every time. Bytes: reads H D
// values, in place from the packed qkv buffer, and writes 4 D. D is a multiple of 8 up to 256 (128
// for fp32); heads and tokens begin at multiples of 16 bytes.
#pragma once

#include <cmath>

#include "key_metric_params.h"
#include "pack.h"

namespace fastast {

struct MetricLane {
  float value[8];
  float part, moved;
};

template <class T>
FASTAST_DEVICE void key_metric_token(Team<MetricLane, 1>& team, const KeyMetric& p, int64_t token) {
  constexpr int kPack = Pack<T>::kSize;
  const int width = static_cast<int>(p.d / kPack);  // lanes of a group
  const int groups = kWarp / width;
  const T* k = static_cast<const T*>(p.k) + token / p.n * p.sample + token % p.n * p.token;
  team.each([&](int i, MetricLane& lane) {
    for (int e = 0; e < kPack; ++e) lane.value[e] = 0;
    const int group = i / width;
    if (group >= groups) return;
    for (int64_t h = group; h < p.heads; h += groups) {
      float v[kPack];
      load_pack(k + h * p.head + i % width * kPack, v);
      for (int e = 0; e < kPack; ++e) lane.value[e] += v[e];
    }
  });
  for (int e = 0; e < kPack; ++e) {
    team.each([&](int, MetricLane& lane) { lane.part = lane.value[e]; });
    team.each([&](int, MetricLane& lane) { lane.value[e] = 0; });
    for (int group = 0; group < groups; ++group) {
      team.move(&MetricLane::part, &MetricLane::moved,
                [&](int i) { return group * width + i % width; });
      team.each([&](int, MetricLane& lane) { lane.value[e] += lane.moved; });
    }
  }
  team.each([&](int i, MetricLane& lane) {
    lane.part = 0;
    for (int e = 0; e < kPack; ++e) {
      lane.value[e] /= p.heads;
      if (i < width) lane.part += lane.value[e] * lane.value[e];
    }
  });
  const float length = sqrtf(team.sum(&MetricLane::part));
  const float scale = 1 / fmaxf(length, 1e-12f);
  team.each([&](int i, MetricLane& lane) {
    if (i >= width) return;
    for (int e = 0; e < kPack; ++e) lane.value[e] *= scale;
    float* out = p.out + token * p.d + i * kPack;
    for (int e = 0; e < kPack; e += 4) store_pack(lane.value + e, out + e);
  });
}

}  // namespace fastast
