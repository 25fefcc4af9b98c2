// Depthwise convolution with "same" padding, forward and backward: x [N, C, H, W], weight [C, 1, K, K] with odd K,
// y [N, C, ceil(H / stride), ceil(W / stride)], NCHW, contiguous. T is float, bfloat16 or float16; sums are float.
#pragma once
#include "small.h"

namespace dwconv {

inline bool is_large(const Shape& s) { return s.stride == 1 && s.kernel > 5; }

template <class T>
void forward(const T* x, const T* weight, const T* bias, const Shape& s, T* y) {
  if (is_large(s)) {
    correlate_large(x, weight, bias, s, Order::kForward, y);
  } else {
    forward_small(x, weight, bias, s, y);
  }
}

// Each of dx, dweight and dbias may be null: then it is not computed.
template <class T>
void backward(const T* x, const T* weight, const T* dy, const Shape& s, T* dx, T* dweight, T* dbias) {
  if (is_large(s)) {
    if (dx) correlate_large(dy, weight, static_cast<const T*>(nullptr), s, Order::kInputGradient, dx);
    if (dweight) weight_gradient_large(x, dy, s, dweight, dbias);
  } else {
    backward_small(x, weight, dy, s, dx, dweight, dbias);
  }
}

}  // namespace dwconv
