// What the filterbank's kernels of every instruction set are made of, and which this processor
// runs. Frames are independent: a caller may split them over threads in any way.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastast {

constexpr float kPreemphasis = 0.97f;

// Kaldi's frames of one clip, as fbank.h has them.
struct Frames {
  const float* x;       // [frames, width], rows hop apart
  const float* mean;    // [frames]
  const float* window;  // [width]
  int64_t width, hop;
  int64_t length;  // of a row of out, zero from width on
  float* out;      // [frames, length]
};

struct Span {
  int32_t bin, bins, weight;
};

struct LogMel {
  const float* spectrum;  // [frames, 2 stored]: real and imaginary parts
  int64_t stored;
  int64_t bins;  // those that a filter covers are below this
  const float* weights;
  const Span* spans;  // [mels]
  int64_t mels;
  float floor;
  float* out;  // [frames, mels]
};

constexpr int64_t kFramesTogether = 16;  // in the lanes of one vector, or of a few

struct FbankKernel {
  void (*frames)(const Frames& p, int64_t begin, int64_t end);
  // powers: room for kFramesTogether values a bin, on a line of 64.
  void (*log_mel)(const LogMel& p, int64_t begin, int64_t end, float* powers);
};

FbankKernel portable_fbank();
#ifdef FASTAST_X86_VARIANTS
FbankKernel avx2_fbank();
FbankKernel avx512_fbank();
#endif

inline FbankKernel fbank_kernel() {
#ifdef FASTAST_X86_VARIANTS
  if (isa() >= Isa::avx512) return avx512_fbank();
  if (isa() == Isa::avx2) return avx2_fbank();
#endif
  return portable_fbank();
}

}  // namespace fastast
