// The filterbank's kernels: see fbank_kernel.h, and fbank.h for the formulas. Included by
// kernels_<isa>.cpp only.
//
// A frame reads hop new samples and writes `length` values; its energies read 2 bins values and
// write `mels`. In the first kernel the lanes of a vector are samples. In the second they are
// frames: a tile of L bins of L frames is transposed after squaring, so that a filter is a plain
// sum over its few bins and the logarithm is taken L frames at a time, and energies are transposed
// back on their way out.
#include "lanes.h"
#include "power.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

// v as it is, rounded: what the compiler may not merge into a fused multiply-add.
FASTAST_INLINE Vec<float> rounded(Vec<float> v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

// Each lane's left neighbour, and the first lane itself.
template <int64_t... i>
FASTAST_INLINE Vec<float> left(Vec<float> v, std::integer_sequence<int64_t, i...>) {
  return chosen(v, v, std::integer_sequence<int64_t, (i > 0 ? i - 1 : 0)...>());
}

inline void fbank_frame_rows(const Frames& p, int64_t begin, int64_t end) {
  constexpr int64_t L = lanes<float>;
  const Vec<float> factor = splat<float>(kPreemphasis);
  for (int64_t n = begin; n < end; ++n) {
    const float* const x = p.x + n * p.hop;
    float* const out = p.out + n * p.length;
    const Vec<float> mean = splat<float>(p.mean[n]);
    const auto frame = [&](int64_t i, Vec<float> samples, Vec<float> before) {
      const Vec<float> emphasised = (samples - mean) - rounded((before - mean) * factor);
      store(out + i, emphasised * load(p.window + i));
    };
    const Vec<float> samples = load(x);
    frame(0, samples, left(samples, Lanes<L>()));
    int64_t i = L;
    for (; i + L <= p.width; i += L) frame(i, load(x + i), load(x + i - 1));
    if (i < p.width) {  // some of it again
      i = p.width - L;
      frame(i, load(x + i), load(x + i - 1));
    }
    std::memset(out + p.width, 0, (p.length - p.width) * sizeof(float));
  }
}

// re^2 + im^2 of the complex values in a, then b.
template <int64_t... i>
FASTAST_INLINE Vec<float> squared(Vec<float> a, Vec<float> b,
                                  std::integer_sequence<int64_t, i...>) {
  a *= a;
  b *= b;
  return chosen(a, b, std::integer_sequence<int64_t, 2 * i...>()) +
         chosen(a, b, std::integer_sequence<int64_t, 2 * i + 1 ...>());
}

// powers[k, lane] of L bins and L frames; those behind the last are the last again.
FASTAST_INLINE void power_tile(const LogMel& p, int64_t first, int64_t last, int64_t bin,
                               float* powers) {
  constexpr int64_t L = lanes<float>;
  Vec<float> tile[L];
#pragma GCC unroll 16
  for (int64_t f = 0; f < L; ++f) {
    const int64_t n = first + f < last ? first + f : last;
    const float* const values = p.spectrum + 2 * (n * p.stored + bin);
    tile[f] = squared(load(values), load(values + L), Lanes<L>());
  }
  transpose(tile, Lanes<L>());
#pragma GCC unroll 16
  for (int64_t k = 0; k < L; ++k) store(powers + (bin + k) * L, tile[k]);
}

FASTAST_INLINE Vec<float> energy(const LogMel& p, const Span& span, const float* powers) {
  constexpr int64_t L = lanes<float>;
  const float* const weights = p.weights + span.weight;
  const float* const power = powers + span.bin * L;
  Vec<float> sum = {};
  for (int64_t k = 0; k < span.bins; ++k) sum += load(power + k * L) * splat<float>(weights[k]);
  return sum;
}

inline void log_mel_rows(const LogMel& p, int64_t begin, int64_t end, float* powers) {
  constexpr int64_t L = lanes<float>;
  const Vec<float> floor = splat<float>(p.floor);
  for (int64_t n = begin; n < end; n += L) {
    int64_t bin = 0;
    for (; bin + L <= p.bins; bin += L) power_tile(p, n, end - 1, bin, powers);
    if (bin < p.bins) power_tile(p, n, end - 1, p.bins - L, powers);  // some of it again
    const int64_t frames = end - n < L ? end - n : L;
    for (int64_t m = 0; m < p.mels; m += L) {
      const int64_t mels = p.mels - m < L ? p.mels - m : L;
      Vec<float> tile[L];
#pragma GCC unroll 16
      for (int64_t j = 0; j < L; ++j) {
        const Vec<float> sum = energy(p, p.spans[j < mels ? m + j : m], powers);
        tile[j] = natural_log(sum < floor ? floor : sum);  // NaN is not less
      }
      transpose(tile, Lanes<L>());
      float* const out = p.out + n * p.mels + m;
      for (int64_t f = 0; f < frames; ++f) {
        if (mels == L)
          store(out + f * p.mels, tile[f]);
        else
          std::memcpy(out + f * p.mels, &tile[f], mels * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
