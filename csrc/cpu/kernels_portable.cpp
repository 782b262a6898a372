// The kernels for any processor: 16-byte vectors, which are SSE2 on x86-64 and NEON on Arm.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "attend.h"
#include "attend_backward.h"
#include "fbank_kernel.h"
#include "kernels.h"
#include "match_kernel.h"

#define FASTAST_ISA portable
#define FASTAST_VECTOR_BYTES 16
#define FASTAST_TILE_ROWS 6
#define FASTAST_TABLE portable_kernels
#define FASTAST_ATTENTION portable_attention
#define FASTAST_ATTENTION_BACKWARD portable_attention_backward
#define FASTAST_MATCH portable_match
#define FASTAST_FBANK portable_fbank
#include "table.h"
