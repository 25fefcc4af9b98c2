// Depthwise convolution with "same" padding, forward and backward: x [N, C, H, W], weight [C, 1, K, K] with odd K,
// y [N, C, ceil(H / stride), ceil(W / stride)], contiguous; forward also in blocks (map.h).
#pragma once
#include <vector>

#include "frequency.h"
#include "narrow.h"
#include "packed.h"
#include "stencil.h"
#include "whole_gradient.h"

namespace dwconv {

inline bool is_large(const Shape& s) { return s.stride == 1 && s.kernel > 5; }

// Measured: over packed planes up to this many pixels, beyond it over pixels of a row.
constexpr int kPackedPixels = 256 * 256;

inline bool is_packed(const Shape& s) {
  return (s.kernel == 3 || s.kernel == 5) && s.channels >= kLanes / 2 &&
         (std::ptrdiff_t)s.height * s.width <= kPackedPixels;
}

// Calls f with K and stride as types, of the four combinations `is_packed` allows.
template <class F>
void with_constants(const Shape& s, F f) {
  using std::integral_constant;
  if (s.kernel == 3 && s.stride == 1) return f(integral_constant<int, 3>{}, integral_constant<int, 1>{});
  if (s.kernel == 3) return f(integral_constant<int, 3>{}, integral_constant<int, 2>{});
  if (s.stride == 1) return f(integral_constant<int, 5>{}, integral_constant<int, 1>{});
  return f(integral_constant<int, 5>{}, integral_constant<int, 2>{});
}

inline void correlate(const Map<const float>& x, const float* weight, const Epilogue& epilogue, const Shape& s, Order order,
                      const Map<float>& y) {
  if (is_narrow(s) && !x.blocked && !y.blocked) {
    correlate_narrow(x.data, weight, epilogue, s, order, y.data);
  } else if (is_whole(s, kWholeMap)) {
    with_correlation(s.height, s.width, [&](const Correlation& c) { correlate_whole(x, weight, epilogue, s, order, y, c); });
  } else if (is_frequent(s)) {
    with_tiling(s, [&](const Tiling& tiling, const RowTransform& transform) {
      correlate_frequencies(x, weight, epilogue, s, order, y, tiling, transform);
    });
  } else {
    correlate_large(x, weight, epilogue, s, order, y);
  }
}

inline void forward(const Map<const float>& x, const float* weight, const Epilogue& epilogue, const Shape& s,
                    const Map<float>& y) {
  const bool blocked = x.blocked || y.blocked;
  if (is_large(s)) {
    correlate(x, weight, epilogue, s, Order::kForward, y);
  } else if (is_stencil(s) && !blocked) {
    (s.stride == 1 ? forward_stencil<1> : forward_stencil<2>)(x.data, weight, epilogue, s, y.data);
  } else if (is_packed(s) || (blocked && (s.kernel == 3 || s.kernel == 5))) {
    with_constants(s, [&](auto k, auto stride) { forward_packed<k(), stride()>(x, weight, epilogue, s, y); });
  } else if (!blocked) {
    forward_rows(x.data, weight, epilogue, s, y.data);
  } else {
    std::vector<float> in(x.pixels * s.batch * s.channels), out(y.pixels * s.batch * s.channels);
    copy_map(x, s.batch, Map<float>{in.data(), s.channels, x.pixels});
    forward_rows(in.data(), weight, epilogue, s, out.data());
    copy_map(Map<const float>{out.data(), s.channels, y.pixels}, s.batch, y);
  }
}

// dx, dweight and dbias may be null, dbias must be where dweight is: what is null is not computed.
inline void backward(const float* x, const float* weight, const float* dy, const Shape& s, float* dx, float* dweight,
                     float* dbias) {
  if (is_large(s)) {
    const std::ptrdiff_t pixels = (std::ptrdiff_t)s.height * s.width;
    const Map<const float> from = {dy, s.channels, pixels};
    if (dx) correlate(from, weight, Epilogue{}, s, Order::kInputGradient, Map<float>{dx, s.channels, pixels});
    if (dweight && is_narrow(s) && !has_pairs()) {
      weight_gradient_narrow(x, dy, s, dweight, dbias);
    } else if (dweight && is_whole(s, kWholeGradient)) {
      weight_gradient_whole(x, dy, s, dweight, dbias);
    } else if (dweight && is_frequent(s) && has_wide_gradient(s)) {
      with_tiling(s, [&](const Tiling& tiling, const RowTransform& transform) {
        weight_gradient_frequencies(x, dy, s, dweight, dbias, tiling, transform);
      });
    } else if (dweight) {
      weight_gradient_large(x, dy, s, dweight, dbias);
    }
  } else if (is_stencil(s)) {
    (s.stride == 1 ? backward_stencil<1> : backward_stencil<2>)(x, weight, dy, s, dx, dweight, dbias);
  } else if (is_packed(s)) {
    with_constants(s, [&](auto k, auto stride) {
      backward_packed<k(), stride()>(x, weight, dy, s, dx, dweight, dbias);
    });
  } else {
    backward_rows(x, weight, dy, s, dx, dweight, dbias);
  }
}

}  // namespace dwconv
