// AMX's eight tiles, all of 16 rows of 64 bytes. Included after the target pragma of its users.
#pragma once

#include <cstdint>

namespace fastast {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
// Of static storage: GCC's intrinsic says that it reads the first eight bytes only, and what is
// written to the others of a variable may never be.
constexpr TileConfig kTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Before a thread's first product, and after its last.
inline void start_tiles() { _tile_loadconfig(&kTiles); }
inline void stop_tiles() { _tile_release(); }

}  // namespace
}  // namespace fastast
