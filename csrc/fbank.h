// The log-mel filterbank around an FFT, which is torch's: frames before it, energies after it. fp32
// only; fastast/features.py calls the three, and says why the FFT is not our own.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fastast {

// out[n, i] = (c[i] - fl(0.97 c[max(i - 1, 0)])) window[i] for c = x[n, i] - mean[n], i < W, and
// 0 from W on: Kaldi's frames. Every operation is rounded by itself, as torch does it: where
// energies are small, the logarithm shows any other rounding.
//
// x [frames, W], W > 16, whose rows may overlap; mean [frames]; window [W]; out [frames, >= W] is
// dense.
void fbank_frames_cpu(const torch::stable::Tensor& x, const torch::stable::Tensor& mean,
                      const torch::stable::Tensor& window, const torch::stable::Tensor& out);

// out[n, m] = log(max(sum_k weights[m, k] |spectrum[n, k]|^2, floor)). Of a filter only the bins
// that it covers are read: spans[m] is its first bin, their number, and where its weights begin.
// NaN stays NaN.
//
// spectrum complex64 [frames, bins], bins >= 16; weights [total]; spans int32 [mels, 3]; out
// [frames, mels] is dense.
void log_mel_cpu(const torch::stable::Tensor& spectrum, const torch::stable::Tensor& weights,
                 const torch::stable::Tensor& spans, double floor,
                 const torch::stable::Tensor& out);

}  // namespace fastast
