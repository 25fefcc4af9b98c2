// Depthwise convolution with "same" padding, forward and backward: x [N, C, H, W], weight [C, 1, K, K] with odd K,
// y [N, C, ceil(H / stride), ceil(W / stride)], contiguous. The forward pass also reads and writes NCHW16c
// (feature_map.h). dispatch.h chooses the algorithm; it is called here.
#pragma once
#include <type_traits>
#include <vector>

#include "depthwise_3x3.h"
#include "depthwise_3x3_5x5_packed.h"
#include "depthwise_generic.h"
#include "depthwise_large_dft.h"
#include "depthwise_large_fir.h"
#include "depthwise_small_map.h"
#include "depthwise_small_map_weight_gradient.h"
#include "depthwise_tiny_map.h"
#include "dispatch.h"

namespace large_kernel {

// Calls f with K and stride as types, for kernels of 3x3 and 5x5.
template <class F>
void with_constants(const Shape& s, F f) {
  using std::integral_constant;
  if (s.kernel == 3 && s.stride == 1) return f(integral_constant<int, 3>{}, integral_constant<int, 1>{});
  if (s.kernel == 3) return f(integral_constant<int, 3>{}, integral_constant<int, 2>{});
  if (s.stride == 1) return f(integral_constant<int, 5>{}, integral_constant<int, 1>{});
  return f(integral_constant<int, 5>{}, integral_constant<int, 2>{});
}

// The forward pass of a large kernel, or its input gradient: a correlation of dy with the kernel rotated by 180
// degrees.
inline void correlate_large_kernel(Algorithm algorithm, const FeatureMap<const float>& x, const float* weight,
                                   const Epilogue& epilogue, const Shape& s, Pass pass, const FeatureMap<float>& y) {
  if (algorithm == Algorithm::kTinyMap) {
    correlate_tiny_map(x.data, weight, epilogue, s, pass, y.data);
  } else if (algorithm == Algorithm::kSmallMap) {
    with_correlation(s.height, s.width,
                     [&](const SmallMapCorrelation& c) { correlate_small_map(x, weight, epilogue, s, pass, y, c); });
  } else if (algorithm == Algorithm::kLargeDft) {
    with_tiling(s, [&](const Tiling& tiling, const RowTransform& transform) {
      correlate_dft(x, weight, epilogue, s, pass, y, tiling, transform);
    });
  } else {
    correlate_fir(x, weight, epilogue, s, pass, y);
  }
}

// Generic code takes NCHW only: other layouts are converted.
inline void forward_generic(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue,
                            const Shape& s, const FeatureMap<float>& y) {
  if (!x.nchw16c && !y.nchw16c) return forward_generic(x.data, weight, epilogue, s, y.data);
  std::vector<float> in(x.pixels * s.batch * s.channels), out(y.pixels * s.batch * s.channels);
  convert_layout(x, s.batch, FeatureMap<float>{in.data(), s.channels, x.pixels});
  forward_generic(in.data(), weight, epilogue, s, out.data());
  convert_layout(FeatureMap<const float>{out.data(), s.channels, y.pixels}, s.batch, y);
}

inline void forward(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue, const Shape& s,
                    const FeatureMap<float>& y) {
  const Algorithm algorithm = forward_algorithm(s, x.nchw16c || y.nchw16c);
  switch (algorithm) {
    case Algorithm::k3x3: return (s.stride == 1 ? forward_3x3<1> : forward_3x3<2>)(x.data, weight, epilogue, s, y.data);
    case Algorithm::kPacked:
      return with_constants(s, [&](auto k, auto stride) { forward_packed<k(), stride()>(x, weight, epilogue, s, y); });
    case Algorithm::kGeneric: return forward_generic(x, weight, epilogue, s, y);
    default: return correlate_large_kernel(algorithm, x, weight, epilogue, s, Pass::kForward, y);
  }
}

// dx, dweight and dbias may be null: those gradients are not computed. dbias needs dweight.
inline void backward(const float* x, const float* weight, const float* dy, const Shape& s, float* dx, float* dweight,
                     float* dbias) {
  const Algorithm algorithm = weight_gradient_algorithm(s);
  if (is_large_kernel(s) && dx) {
    const std::ptrdiff_t pixels = (std::ptrdiff_t)s.height * s.width;
    correlate_large_kernel(input_gradient_algorithm(s), FeatureMap<const float>{dy, s.channels, pixels}, weight,
                           Epilogue{}, s, Pass::kInputGradient, FeatureMap<float>{dx, s.channels, pixels});
  }
  if (is_large_kernel(s) && !dweight) return;
  switch (algorithm) {
    case Algorithm::kTinyMap: return weight_gradient_tiny_map(x, dy, s, dweight, dbias);
    case Algorithm::kSmallMap: return weight_gradient_small_map(x, dy, s, dweight, dbias);
    case Algorithm::kLargeDft:
      return with_tiling(s, [&](const Tiling& tiling, const RowTransform& transform) {
        weight_gradient_dft(x, dy, s, dweight, dbias, tiling, transform);
      });
    case Algorithm::kLargeFir: return weight_gradient_fir(x, dy, s, dweight, dbias);
    // These compute both gradients from the same loads.
    case Algorithm::k3x3:
      return (s.stride == 1 ? backward_3x3<1> : backward_3x3<2>)(x, weight, dy, s, dx, dweight, dbias);
    case Algorithm::kPacked:
      return with_constants(
          s, [&](auto k, auto stride) { backward_packed<k(), stride()>(x, weight, dy, s, dx, dweight, dbias); });
    case Algorithm::kGeneric: return backward_generic(x, weight, dy, s, dx, dweight, dbias);
  }
}

}  // namespace large_kernel
