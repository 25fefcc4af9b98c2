// The shape of a depthwise convolution, and small types that several kernels share.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace large_kernel {

// x [batch, channels, height, width]; kernel and stride are the same along both axes. A block is kLanes channels.
struct Shape {
  int batch, channels, height, width, kernel, stride;
  int out_height() const { return (height - 1) / stride + 1; }
  int out_width() const { return (width - 1) / stride + 1; }
  int blocks() const { return (channels + kLanes - 1) / kLanes; }
  int lanes(int block) const { return std::min(kLanes, channels - block * kLanes); }
};

// A correlation with the kernel, or with the kernel rotated by 180 degrees, which gives the input gradient from dy.
enum class Pass { kForward, kInputGradient };

constexpr int kMaxStaticSize = 8;

// Calls f with a size from 5 to kMaxStaticSize as a type. Rows or columns of such a size are held in registers.
template <class F>
void with_static_size(int size, F f) {
  using std::integral_constant;
  static_assert(kMaxStaticSize == 8);
  switch (size) {
    case 5: return f(integral_constant<int, 5>{});
    case 6: return f(integral_constant<int, 6>{});
    case 7: return f(integral_constant<int, 7>{});
    case 8: return f(integral_constant<int, 8>{});
  }
}

// A view of packed weights: a [rows, columns] subset of the taps, possibly reversed or with a stride.
struct TapView {
  const Vec* weight;
  int rows, columns, row_step, column_step;
  const Vec& at(int y, int x) const { return weight[y * row_step + x * column_step]; }
};

}  // namespace large_kernel
