// The kernels for any processor: 16-byte vectors, which are SSE2 on x86-64 and NEON on Arm.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define FASTAST_ISA portable
#define FASTAST_VECTOR_BYTES 16
#define FASTAST_TILE_ROWS 6
#define FASTAST_TABLE portable_kernels
#include "table.h"
