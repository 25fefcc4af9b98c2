// Depthwise convolution with "same" padding, forward and backward: x [N, C, H, W], weight [C, 1, K, K] with odd K,
// y [N, C, ceil(H / stride), ceil(W / stride)], contiguous; forward also in blocks (map.h).
#pragma once
#include <vector>

#include "depthwise_large_dft.h"
#include "depthwise_tiny_map.h"
#include "depthwise_3x3_5x5_packed.h"
#include "depthwise_3x3.h"
#include "depthwise_small_map_weight_gradient.h"

namespace large_kernel {

inline bool uses_large_kernel(const Shape& s) { return s.stride == 1 && s.kernel > 5; }

// Measured: over packed planes up to this many pixels, beyond it over pixels of a row.
constexpr int kMaxPackedPixels = 256 * 256;

inline bool uses_packed(const Shape& s) {
  return (s.kernel == 3 || s.kernel == 5) && s.channels >= kLanes / 2 &&
         (std::ptrdiff_t)s.height * s.width <= kMaxPackedPixels;
}

// Calls f with K and stride as types, of the four combinations `uses_packed` allows.
template <class F>
void with_constants(const Shape& s, F f) {
  using std::integral_constant;
  if (s.kernel == 3 && s.stride == 1) return f(integral_constant<int, 3>{}, integral_constant<int, 1>{});
  if (s.kernel == 3) return f(integral_constant<int, 3>{}, integral_constant<int, 2>{});
  if (s.stride == 1) return f(integral_constant<int, 5>{}, integral_constant<int, 1>{});
  return f(integral_constant<int, 5>{}, integral_constant<int, 2>{});
}

inline void correlate_large_kernel(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue, const Shape& s, Pass pass,
                      const FeatureMap<float>& y) {
  if (uses_tiny_map(s) && !x.nchw16c && !y.nchw16c) {
    correlate_tiny_map(x.data, weight, epilogue, s, pass, y.data);
  } else if (reaches_across_small_map(s, kSmallMapReach)) {
    with_correlation(s.height, s.width, [&](const SmallMapCorrelation& c) { correlate_small_map(x, weight, epilogue, s, pass, y, c); });
  } else if (dft_pays(s)) {
    with_tiling(s, [&](const Tiling& tiling, const RowTransform& transform) {
      correlate_dft(x, weight, epilogue, s, pass, y, tiling, transform);
    });
  } else {
    correlate_fir(x, weight, epilogue, s, pass, y);
  }
}

inline void forward(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue, const Shape& s,
                    const FeatureMap<float>& y) {
  const bool nchw16c = x.nchw16c || y.nchw16c;
  if (uses_large_kernel(s)) {
    correlate_large_kernel(x, weight, epilogue, s, Pass::kForward, y);
  } else if (uses_3x3(s) && !nchw16c) {
    (s.stride == 1 ? forward_3x3<1> : forward_3x3<2>)(x.data, weight, epilogue, s, y.data);
  } else if (uses_packed(s) || (nchw16c && (s.kernel == 3 || s.kernel == 5))) {
    with_constants(s, [&](auto k, auto stride) { forward_packed<k(), stride()>(x, weight, epilogue, s, y); });
  } else if (!nchw16c) {
    forward_generic(x.data, weight, epilogue, s, y.data);
  } else {
    std::vector<float> in(x.pixels * s.batch * s.channels), out(y.pixels * s.batch * s.channels);
    convert_layout(x, s.batch, FeatureMap<float>{in.data(), s.channels, x.pixels});
    forward_generic(in.data(), weight, epilogue, s, out.data());
    convert_layout(FeatureMap<const float>{out.data(), s.channels, y.pixels}, s.batch, y);
  }
}

// dx, dweight and dbias may be null, dbias must be where dweight is: what is null is not computed.
inline void backward(const float* x, const float* weight, const float* dy, const Shape& s, float* dx, float* dweight,
                     float* dbias) {
  if (uses_large_kernel(s)) {
    const std::ptrdiff_t pixels = (std::ptrdiff_t)s.height * s.width;
    const FeatureMap<const float> from = {dy, s.channels, pixels};
    if (dx) correlate_large_kernel(from, weight, Epilogue{}, s, Pass::kInputGradient, FeatureMap<float>{dx, s.channels, pixels});
    if (dweight && uses_tiny_map(s) && !packs_plane_pairs()) {
      weight_gradient_tiny_map(x, dy, s, dweight, dbias);
    } else if (dweight && reaches_across_small_map(s, kSmallMapGradientReach)) {
      weight_gradient_small_map(x, dy, s, dweight, dbias);
    } else if (dweight && dft_pays(s) && dft_gradient_is_accurate(s)) {
      with_tiling(s, [&](const Tiling& tiling, const RowTransform& transform) {
        weight_gradient_dft(x, dy, s, dweight, dbias, tiling, transform);
      });
    } else if (dweight) {
      weight_gradient_fir(x, dy, s, dweight, dbias);
    }
  } else if (uses_3x3(s)) {
    (s.stride == 1 ? backward_3x3<1> : backward_3x3<2>)(x, weight, dy, s, dx, dweight, dbias);
  } else if (uses_packed(s)) {
    with_constants(s, [&](auto k, auto stride) {
      backward_packed<k(), stride()>(x, weight, dy, s, dx, dweight, dbias);
    });
  } else {
    backward_generic(x, weight, dy, s, dx, dweight, dbias);
  }
}

}  // namespace large_kernel
