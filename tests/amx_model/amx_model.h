// A model in software of the AMX instructions that large_kernel/csrc/amx.h uses, so that its code runs on any processor.
// It checks what the processor would trap on: a missing configuration, tiles that are too large, an unaligned row.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

inline bool lk_amx_enabled = false;  // what `has_amx` returns

namespace amx_model {

struct Tile {
  uint8_t bytes[16][64];
};

struct Thread {
  bool configured = false;
  int rows[8], row_bytes[8];
  Tile tiles[8];
};

inline thread_local Thread thread;

inline void require(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "AMX model: %s\n", message);
  std::abort();
}

inline Tile& tile(int index) {
  require(thread.configured, "a tile is used before _tile_loadconfig or after _tile_release");
  require(index >= 0 && index < 8, "there are 8 tiles");
  require(thread.rows[index] && thread.row_bytes[index], "a tile is used whose size is 0");
  return thread.tiles[index];
}

inline void load_config(const void* config) {
  const uint8_t* const bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1, "only palette 1 exists");
  for (int i = 1; i < 16; i++) require(bytes[i] == 0, "reserved bytes must be zero");
  for (int i = 0; i < 16; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    require(i < 8 ? rows <= 16 && row_bytes <= 64 : !rows && !row_bytes, "a tile has at most 16 rows of 64 bytes");
    if (i < 8) thread.rows[i] = rows, thread.row_bytes[i] = row_bytes;
  }
  std::memset(thread.tiles, 0, sizeof thread.tiles);
  thread.configured = true;
}

inline void load(int index, const void* from, std::ptrdiff_t stride) {
  Tile& to = tile(index);
  for (int row = 0; row < thread.rows[index]; row++) {
    std::memcpy(to.bytes[row], static_cast<const uint8_t*>(from) + row * stride, thread.row_bytes[index]);
  }
}

inline void store(int index, void* to, std::ptrdiff_t stride) {
  const Tile& from = tile(index);
  for (int row = 0; row < thread.rows[index]; row++) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, from.bytes[row], thread.row_bytes[index]);
  }
}

// sum[m][n] += products of word k of a's row m and word n of b's row k, by `multiply`.
template <class Number, class F>
void multiply_tiles(int sum, int a, int b, F multiply) {
  Tile &s = tile(sum), &x = tile(a), &y = tile(b);
  require(thread.rows[sum] == thread.rows[a] && thread.row_bytes[sum] == thread.row_bytes[b] &&
              thread.row_bytes[a] == 4 * thread.rows[b],
          "the sizes of the tiles do not fit");
  require(sum != a && sum != b && a != b, "three different tiles are needed");
  for (int m = 0; m < thread.rows[sum]; m++) {
    for (int k = 0; k < thread.rows[b]; k++) {
      for (int n = 0; n < thread.row_bytes[sum] / 4; n++) {
        Number value;
        std::memcpy(&value, s.bytes[m] + 4 * n, sizeof value);
        multiply(value, x.bytes[m] + 4 * k, y.bytes[k] + 4 * n);
        std::memcpy(s.bytes[m] + 4 * n, &value, sizeof value);
      }
    }
  }
}

inline float bfloat16_value(const uint8_t* at) {
  const uint32_t bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void multiply_bfloat16(int sum, int a, int b) {
  multiply_tiles<float>(sum, a, b, [](float& value, const uint8_t* x, const uint8_t* y) {
    for (int i = 0; i < 4; i += 2) value += bfloat16_value(x + i) * bfloat16_value(y + i);
  });
}

inline void multiply_unsigned_by_signed(int sum, int a, int b) {
  multiply_tiles<int32_t>(sum, a, b, [](int32_t& value, const uint8_t* x, const uint8_t* y) {
    for (int i = 0; i < 4; i++) value += (int32_t)x[i] * (int8_t)y[i];
  });
}

}  // namespace amx_model

// as in the compiler's headers; defined there, they would need a processor with AMX
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(config) amx_model::load_config(config)
#define _tile_release() (amx_model::thread.configured = false)
#define _tile_zero(index) std::memset(&amx_model::tile(index), 0, sizeof(amx_model::Tile))
#define _tile_loadd(index, from, stride) amx_model::load(index, from, stride)
#define _tile_stored(index, to, stride) amx_model::store(index, to, stride)
#define _tile_dpbf16ps(sum, a, b) amx_model::multiply_bfloat16(sum, a, b)
#define _tile_dpbusd(sum, a, b) amx_model::multiply_unsigned_by_signed(sum, a, b)
