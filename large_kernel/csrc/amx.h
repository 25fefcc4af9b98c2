// Tiles of products with AMX, which Intel's server processors have since Sapphire Rapids: 32 pixels by 32 output
// channels of bfloat16 or int8 products.
//
//   registers   0-3: sums, 16 pixels by 16 channels each      4, 5: pixels [16][16 words]      6, 7: weights [16 words][16]
//
// A row of packed pixels and a row of packed weights are both one row of a tile register: nothing is rearranged.
#pragma once
#include "gemm_product.h"

#if defined(LK_AMX_MODEL)  // the tests' software model of the instructions
#include LK_AMX_MODEL
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <sys/syscall.h>
#endif

#if defined(LK_AMX_MODEL) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__))
#define LK_AMX 1
#endif

namespace large_kernel {

constexpr int kAmxPixels = 32, kAmxVectors = 2;  // of a tile of products

#if defined(LK_AMX)
struct AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Whether the system lets this process use the tile registers. Linux grants them on request, to processes only that ask.
inline bool has_amx() {
#if defined(LK_AMX_MODEL)
  return lk_amx_enabled;
#else
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#endif
}

// The tile registers of a thread, in use during the lifetime of this object.
class AmxTiles {
 public:
  explicit AmxTiles(bool use) : used_(use) {
    // Not on the stack: GCC takes it that the instruction reads 8 bytes, and leaves out the stores of all others.
    static constexpr AmxConfig config;
    if (used_) _tile_loadconfig(&config);
  }
  ~AmxTiles() {
    if (used_) _tile_release();
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  const bool used_;
};

// sum += pixels * weights; the numbers of the registers are part of the instruction.
#define LK_AMX_MULTIPLY(sum, pixels, weights)    \
  if constexpr (P::kPerWord == 2) {              \
    _tile_dpbf16ps(sum, pixels, weights);        \
  } else {                                       \
    _tile_dpbusd(sum, pixels, weights);          \
  }

// As `gemm_tile` of conv_gemm.h, with 32 pixels and V <= 2 vectors. `depth` is a multiple of kWords; `x` and `weight` are
// blocks of kWords words, `x_block` and `weight_block` words apart.
template <class P, int V>
void amx_tile(const float* weight, std::ptrdiff_t weight_block, const float* x, std::ptrdiff_t x_block, int depth,
              bool add, Vec* to, std::ptrdiff_t pitch) {
  constexpr int row = kWords * sizeof(float);
  float* const sums = reinterpret_cast<float*>(to);
  float* const second = reinterpret_cast<float*>(to + pitch);
  asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory: all stores come before
  if (add) {
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + 16 * kWords, row);
    if constexpr (V == 2) {
      _tile_loadd(2, second, row);
      _tile_loadd(3, second + 16 * kWords, row);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (V == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int k = 0; k < depth; k += kWords, x += x_block, weight += kWords * kWords) {
    _tile_loadd(4, x, row);
    _tile_loadd(5, x + 16 * kWords, row);
    _tile_loadd(6, weight, row);
    LK_AMX_MULTIPLY(0, 4, 6)
    LK_AMX_MULTIPLY(1, 5, 6)
    if constexpr (V == 2) {
      _tile_loadd(7, weight + weight_block, row);
      LK_AMX_MULTIPLY(2, 4, 7)
      LK_AMX_MULTIPLY(3, 5, 7)
    }
  }
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + 16 * kWords, row);
  if constexpr (V == 2) {
    _tile_stored(2, second, row);
    _tile_stored(3, second + 16 * kWords, row);
  }
}
#else
inline bool has_amx() { return false; }

struct AmxTiles {
  explicit AmxTiles(bool) {}
};
#endif

}  // namespace large_kernel
