// The kernel table of one instruction set, from the sources above. Included by kernels_<isa>.cpp
// after FASTAST_ISA, FASTAST_VECTOR_BYTES, FASTAST_TILE_ROWS, FASTAST_TABLE, FASTAST_ATTENTION,
// FASTAST_ATTENTION_BACKWARD, FASTAST_MATCH and FASTAST_FBANK are defined.
#include "vec.h"

#include "attention_backward_rows.h"
#include "attention_rows.h"
#include "fbank_rows.h"
#include "int8_rows.h"
#include "key_metric_rows.h"
#include "match_rows.h"
#include "merge_rows.h"
#include "norm_rows.h"

namespace fastast {

template <class T>
const Kernels<T>& FASTAST_TABLE() {
  using namespace FASTAST_ISA;
  static constexpr Kernels<T> table = {
      merge_rows<T>,         sum_rows<T>,        gather_rows<T>, add_norm_rows<T>,
      add_norm_grad_rows<T>, key_metric_rows<T>, peak_of<T>,     round_run<T>,
  };
  return table;
}

template <class T>
AttendKernel<T> FASTAST_ATTENTION() {
  using namespace FASTAST_ISA;
  return attend_kernel<T, MultiplyAdd<Accumulate<T>>>();
}

template <class T>
AttendBackwardKernel<T> FASTAST_ATTENTION_BACKWARD() {
  using namespace FASTAST_ISA;
  return attend_backward_kernel<T, MultiplyAdd<Accumulate<T>>>();
}

template <class T>
MatchKernel<T> FASTAST_MATCH() {
  return FASTAST_ISA::match_kernel_of_rows<T>();
}

FbankKernel FASTAST_FBANK() { return {FASTAST_ISA::fbank_frame_rows, FASTAST_ISA::log_mel_rows}; }

template const Kernels<double>& FASTAST_TABLE<double>();
template const Kernels<float>& FASTAST_TABLE<float>();
template const Kernels<bf16>& FASTAST_TABLE<bf16>();
template const Kernels<f16>& FASTAST_TABLE<f16>();
template AttendKernel<double> FASTAST_ATTENTION<double>();
template AttendKernel<float> FASTAST_ATTENTION<float>();
template AttendKernel<bf16> FASTAST_ATTENTION<bf16>();
template AttendKernel<f16> FASTAST_ATTENTION<f16>();
template AttendBackwardKernel<double> FASTAST_ATTENTION_BACKWARD<double>();
template AttendBackwardKernel<float> FASTAST_ATTENTION_BACKWARD<float>();
template AttendBackwardKernel<bf16> FASTAST_ATTENTION_BACKWARD<bf16>();
template AttendBackwardKernel<f16> FASTAST_ATTENTION_BACKWARD<f16>();
template MatchKernel<double> FASTAST_MATCH<double>();
template MatchKernel<float> FASTAST_MATCH<float>();
template MatchKernel<bf16> FASTAST_MATCH<bf16>();
template MatchKernel<f16> FASTAST_MATCH<f16>();

}  // namespace fastast
