// The ops of fbank.h: their checks, and threads over groups of frames.
#include "../fbank.h"

#include "common.h"
#include "fbank_kernel.h"

namespace fastast {
namespace {

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

void expect_floats(const Tensor& t, int64_t dims, const char* what) {
  expect(t.scalar_type() == ScalarType::Float && t.dim() == dims && t.is_contiguous(), what);
}

// f(begin, end) over frames, a few groups a thread at least.
template <class F>
void parallel_frames(int64_t frames, const F& f) {
  const int64_t groups = (frames + kFramesTogether - 1) / kFramesTogether;
  torch::stable::parallel_for(0, groups, 4, [&](int64_t begin, int64_t end) {
    f(begin * kFramesTogether, std::min(end * kFramesTogether, frames));
  });
}

}  // namespace

void fbank_frames_cpu(const Tensor& x_, const Tensor& mean, const Tensor& window,
                      const Tensor& out) {
  expect(x_.scalar_type() == ScalarType::Float && x_.dim() == 2, "x must be fp32 [frames, width]");
  expect_floats(mean, 1, "mean must be dense fp32 [frames]");
  expect_floats(window, 1, "window must be dense fp32 [width]");
  expect_floats(out, 2, "out must be dense fp32 [frames, length]");
  const Tensor x = dense_rows(x_);
  const int64_t frames = x.size(0), width = x.size(1), length = out.size(1);
  expect(mean.size(0) == frames && out.size(0) == frames,
         "mean and out must have a row for every frame");
  expect(window.size(0) == width && width > kFramesTogether && length >= width,
         "window must be as wide as x, more than 16 samples, and out no narrower");
  const Frames p = {
      data<float>(x), data<float>(mean),       data<float>(window), width, x.stride(0),
      length,         mutable_data<float>(out)};
  const FbankKernel kernel = fbank_kernel();
  parallel_frames(frames, [&](int64_t begin, int64_t end) { kernel.frames(p, begin, end); });
}

void log_mel_cpu(const Tensor& spectrum, const Tensor& weights, const Tensor& spans, double floor,
                 const Tensor& out) {
  expect(spectrum.scalar_type() == ScalarType::ComplexFloat && spectrum.dim() == 2 &&
             spectrum.is_contiguous() && spectrum.size(1) >= kFramesTogether,
         "spectrum must be dense complex64 [frames, bins], of 16 bins or more");
  expect_floats(weights, 1, "weights must be dense fp32 [total]");
  expect(spans.scalar_type() == ScalarType::Int && spans.dim() == 2 && spans.size(1) == 3 &&
             spans.is_contiguous(),
         "spans must be dense int32 [mels, 3]");
  expect_floats(out, 2, "out must be dense fp32 [frames, mels]");
  const int64_t frames = spectrum.size(0), stored = spectrum.size(1), mels = spans.size(0);
  expect(out.size(0) == frames && out.size(1) == mels,
         "out must have a row for every frame and a column for every span");
  static_assert(sizeof(Span) == 3 * sizeof(int32_t));
  const Span* const filters = reinterpret_cast<const Span*>(data<int32_t>(spans));
  int64_t bins = kFramesTogether;  // a whole vector at least
  for (int64_t m = 0; m < mels; ++m) {
    const Span& s = filters[m];
    expect(s.bin >= 0 && s.bins >= 0 && s.weight >= 0 && int64_t{s.bin} + s.bins <= stored &&
               int64_t{s.weight} + s.bins <= weights.size(0),
           "spans must lie in the spectrum and in weights");
    bins = std::max<int64_t>(bins, s.bin + s.bins);
  }
  const LogMel p = {static_cast<const float*>(spectrum.const_data_ptr()),
                    stored,
                    bins,
                    data<float>(weights),
                    filters,
                    mels,
                    static_cast<float>(floor),
                    mutable_data<float>(out)};
  const FbankKernel kernel = fbank_kernel();
  parallel_frames(frames, [&](int64_t begin, int64_t end) {
    Scratch<float> powers(bins * kFramesTogether);
    kernel.log_mel(p, begin, end, powers.get());
  });
}

}  // namespace fastast
