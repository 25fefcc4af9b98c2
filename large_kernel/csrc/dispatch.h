// Which code computes a depthwise convolution: all selection rules and measured thresholds. The first row that matches
// applies.
//
//   kernel  stride  feature map                                   algorithm  file
//   ------  ------  --------------------------------------------  ---------  ----------------------------------------
//   >= 7    1       NCHW, 5x5 to 8x8, covered by the kernel       kTinyMap   depthwise_tiny_map.h
//   >= 7    1       5x5 to 16x16, (nearly) covered                kSmallMap  depthwise_small_map.h, its weight gradient
//                                                                            depthwise_small_map_weight_gradient.h
//   >= 7    1       any on which a DFT along the rows pays        kLargeDft  depthwise_large_dft.h
//   >= 7    1       any other                                     kLargeFir  depthwise_large_fir.h
//   3       1, 2    NCHW, wider than about one vector             k3x3       depthwise_3x3.h
//   3, 5    1, 2    NCHW16c; NCHW up to 256x256, >= 1/2 vector    kPacked    depthwise_3x3_5x5_packed.h
//                   of channels
//   any     1, 2    any other                                     kGeneric   depthwise_generic.h
//
// Examples: 56x56 with 31x31 taps and 28x28 with 29x29 use kLargeDft, 14x14 with 27x27 kSmallMap, all three for the
// forward pass, the input gradient and the weight gradient. 7x7 with 13x13 uses kTinyMap, but kSmallMap for a forward
// pass in NCHW16c, and for the weight gradient if `packs_plane_pairs`. Gradients are computed in NCHW. The input
// gradient uses the algorithm of the forward pass, the weight gradient has bounds of its own
// (`weight_gradient_algorithm`).
//
// Dense convolutions are in conv_gemm.h, batch norms in training in batch_norm.h.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "shape.h"
#include "vector.h"

namespace large_kernel {

enum class Algorithm { kTinyMap, kSmallMap, kLargeDft, kLargeFir, k3x3, kPacked, kGeneric };

// ---- kernels of at least 7x7 at stride 1 ----

inline bool is_large_kernel(const Shape& s) { return s.stride == 1 && s.kernel > 5; }

constexpr int kTinySide = kMaxStaticSize;  // pixels per side of the largest map that depthwise_tiny_map.h takes

// Square maps only: others would double the amount of code. Maps below 5x5 would leave most registers empty.
inline bool fits_tiny_map(const Shape& s) {
  return kLanes >= kTinySide && s.height == s.width && s.width <= kTinySide && s.width > kTinySide / 2 &&
         s.kernel / 2 >= s.width - 1;
}

#if defined(__AVX512DQ__)
constexpr bool kHasPlanePairs = true;
#else
constexpr bool kHasPlanePairs = false;
#endif

// Whether depthwise_tiny_map.h computes two planes in a vector of 16 lanes. This pays where the processor multiplies
// two such vectors per cycle: vectors of 8 lanes would leave half of its throughput unused.
inline bool packs_plane_pairs() { return kHasPlanePairs && has_large_l1(); }

// pixels of a row or column that is computed without splitting it in halves
constexpr int kDirectSide = kMaxStaticSize;

// The least share of the longer side that a kernel has to reach across. A smaller kernel would waste more
// multiplications by its missing taps, which count as zeros, than the algorithm saves.
constexpr float kSmallMapReach = 0.75f, kSmallMapWeightGradientReach = 0.55f;

inline bool fits_small_map(const Shape& s, float reach) {
  const int longest = std::max(s.height, s.width), shortest = std::min(s.height, s.width);
  return longest <= 2 * kDirectSide && shortest > kDirectSide / 2 && s.kernel / 2 >= reach * (longest - 1);
}

// Products of taps and pixels along an axis of `size` outputs, without those on padding.
inline std::int64_t valid_taps(int size, int kernel) {
  const std::int64_t reach = std::min(kernel / 2, size - 1);
  return size + reach * (2 * size - 1 - reach);
}

// How a row of outputs is divided into tiles for depthwise_large_dft.h. A tile is a cyclic correlation of `length`
// numbers, long enough that no product which wraps around reaches an output of the tile.
struct Tiling {
  int length = 0, tiles = 0;  // length of a transform; 0: no length fits
  float cost = 0;             // multiply-adds per plane, approximately

  static Tiling of(int length, const Shape& s) {
    const int reach = s.kernel / 2, m = length / 4;
    const int most = s.width + reach <= length ? s.width : length - 2 * reach;  // outputs per tile
    if (reach >= length / 2 || most < 1) return {};
    const int tiles = (s.width + most - 1) / most;
    const float transform = 2.f * m * m + 24 * m;
    const int tap_rows = std::min(s.kernel, 2 * s.height - 1);
    return {length, tiles,
            tap_rows * transform + tiles * (2 * s.height * transform + 2.f * length * valid_taps(s.height, s.kernel))};
  }
};

inline Tiling best_tiling(const Shape& s) {
  Tiling best;
  for (int length : {44, 60, 76}) {
    const Tiling tiling = Tiling::of(length, s);
    if (tiling.length && (!best.length || tiling.cost < best.cost)) best = tiling;
  }
  return best;
}

inline bool dft_pays(const Shape& s) {
  const Tiling tiling = best_tiling(s);
  return tiling.length && tiling.cost < 0.75f * valid_taps(s.height, s.kernel) * valid_taps(s.width, s.kernel);
}

// The outermost taps have to meet enough columns: the DFT's rounding errors are relative to whole rows.
inline bool dft_weight_gradient_is_accurate(const Shape& s) { return s.kernel / 2 <= 0.6f * s.width; }

// Levels of the fast FIR algorithm in depthwise_large_fir.h: each saves a quarter of the multiplications and adds sums
// of rows, which cost relatively more on processors that multiply two of the widest vectors per cycle.
inline int fir_levels(int filter_rows, int input_rows) {
  const int rows = std::min(filter_rows, input_rows);
  return rows >= 24 && !has_large_l1() ? 3 : rows >= 12 ? 2 : rows >= 8 ? 1 : 0;
}

// ---- 3x3 and 5x5 kernels ----

// Narrower maps are packed, which fills vectors at any width.
constexpr int kMin3x3Width = kLanes == 16 ? 10 : kLanes == 8 ? 32 : 1 << 30;

inline bool fits_3x3(const Shape& s) { return s.kernel == 3 && s.width >= kMin3x3Width; }

// Whether, at stride 2, a vector of 16 lanes holds two rows of outputs.
constexpr bool packs_row_pairs(int out_width) { return out_width <= kLanes / 2; }

// Whether the input gradient of a 3x3 convolution at stride 2 is written with non-temporal stores. The caches could not
// hold one of this size, and ordinary stores would first read what they overwrite.
inline bool streams_past_caches([[maybe_unused]] const Shape& s, [[maybe_unused]] const void* dx) {
#if defined(__AVX512F__)
  constexpr std::ptrdiff_t least = 2 << 20;  // pixels
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  return plane * s.channels * s.batch >= least && plane % kLanes == 0 && s.width % 2 == 0 &&
         (std::uintptr_t)dx % 64 == 0;
#else
  return false;
#endif
}

// Packed planes of more pixels do not stay in the caches.
constexpr int kMaxPackedPixels = 256 * 256;

inline bool fits_packed(const Shape& s) {
  return (s.kernel == 3 || s.kernel == 5) && s.channels >= kLanes / 2 &&
         (std::ptrdiff_t)s.height * s.width <= kMaxPackedPixels;
}

// ---- the choice ----

// `nchw16c`: whether input or output has this layout.
inline Algorithm forward_algorithm(const Shape& s, bool nchw16c) {
  if (is_large_kernel(s)) {
    if (fits_tiny_map(s) && !nchw16c) return Algorithm::kTinyMap;
    if (fits_small_map(s, kSmallMapReach)) return Algorithm::kSmallMap;
    return dft_pays(s) ? Algorithm::kLargeDft : Algorithm::kLargeFir;
  }
  if (fits_3x3(s) && !nchw16c) return Algorithm::k3x3;
  if (fits_packed(s) || (nchw16c && (s.kernel == 3 || s.kernel == 5))) return Algorithm::kPacked;
  return Algorithm::kGeneric;
}

// Gradients are computed in NCHW.
inline Algorithm input_gradient_algorithm(const Shape& s) { return forward_algorithm(s, false); }

inline Algorithm weight_gradient_algorithm(const Shape& s) {
  if (!is_large_kernel(s)) return forward_algorithm(s, false);
  if (fits_tiny_map(s) && !packs_plane_pairs()) return Algorithm::kTinyMap;
  if (fits_small_map(s, kSmallMapWeightGradientReach)) return Algorithm::kSmallMap;
  return dft_pays(s) && dft_weight_gradient_is_accurate(s) ? Algorithm::kLargeDft : Algorithm::kLargeFir;
}

}  // namespace large_kernel
