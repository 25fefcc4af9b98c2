// 1x1 convolutions in training, with products in bfloat16 and sums in float32: x [N, C, pixels], weight [O, C], y [N, O,
// pixels], all float32. Each pass is a matrix product of conv_gemm.h:
//
//   y  = weight x                 terms: C
//   dx = weight^T dy              terms: O
//   dweight = dy x^T              terms: images and pixels, in slices, whose sums are added in order
#pragma once
#include <algorithm>

#include "conv_gemm.h"

namespace large_kernel {

// Two vectors of float32 as the lower and upper halves of words in bfloat16.
LK_INLINE Vec bfloat16_words(Vec low, Vec high) {
  const VecU32 lower = __builtin_convertvector(to_bfloat16(low), VecU32);
  const VecU32 upper = __builtin_convertvector(to_bfloat16(high), VecU32);
  return (Vec)(lower | upper << 16);
}

// A matrix [rows][terms] as the weight of a matrix product, packed into the words [rows / 16][packed_rows][16].
class Bfloat16Weights {
 public:
  // `read(row, lanes, term, count, out)` reads vectors of `lanes` rows of consecutive terms; lanes past the last repeat it,
  // as in `pack`.
  template <class F>
  Bfloat16Weights(int rows, int terms, F read)
      : depth_(packed_rows<Bfloat16Product>(terms)),
        words_((std::size_t)(rows + kChannelBlock - 1) / kChannelBlock * depth_ * kChannelBlock) {
    constexpr int strip = 2 * kWords;  // terms
#pragma omp parallel for
    for (int row = 0; row < rows; row += kLanes) {
      const int lanes = std::min(kLanes, rows - row);
      float* const to =
          words_.floats() + (std::ptrdiff_t)(row / kChannelBlock) * depth_ * kChannelBlock + row % kChannelBlock;
      for (int term = 0; term < 2 * depth_; term += strip) {
        Vec values[strip] = {};
        const int count = std::min(strip, terms - term);
        if (count > 0) read(row, lanes, term, count, values);
        for (int i = 0; i < strip; i += 2) {
          store(to + (std::ptrdiff_t)(term + i) / 2 * kChannelBlock, bfloat16_words(values[i], values[i + 1]));
        }
      }
    }
  }

  PackedWeights<Bfloat16Product> weights() const { return {words_.floats()}; }

 private:
  int depth_;
  Scratch words_;
};

inline void pointwise_product(const FeatureMap<const float>& x, int batch, const Bfloat16Weights& weight,
                              const FeatureMap<float>& y) {
  const Shape s = {batch, x.channels, 1, (int)x.pixels, 1, 1};
  conv_gemm(x, weight.weights(), nullptr, nullptr, {}, nullptr, s, y);
}

inline void pointwise_forward(const float* x, const float* weight, int batch, int in_channels, int out_channels,
                              std::ptrdiff_t pixels, float* y) {
  const Bfloat16Weights packed(out_channels, in_channels, [&](int row, int lanes, int term, int count, Vec* out) {
    pack(weight + (std::ptrdiff_t)row * in_channels + term, in_channels, lanes, count, out);
  });
  pointwise_product({x, in_channels, pixels}, batch, packed, {y, out_channels, pixels});
}

inline void pointwise_input_gradient(const float* weight, const float* dy, int batch, int in_channels,
                                     int out_channels, std::ptrdiff_t pixels, float* dx) {
  const Bfloat16Weights packed(in_channels, out_channels, [&](int row, int lanes, int term, int count, Vec* out) {
    for (int i = 0; i < count; i++) {
      const float* const from = weight + (std::ptrdiff_t)(term + i) * in_channels + row;
      out[i] = lanes == kLanes ? load(from) : load_lanes(from, lanes);
    }
  });
  pointwise_product({dy, out_channels, pixels}, batch, packed, {dx, in_channels, pixels});
}

inline void pointwise_weight_gradient(const float* x, const float* dy, int batch, int in_channels, int out_channels,
                                      std::ptrdiff_t pixels, float* dweight) {
  // Terms per slice: the packed gradients of y take at most 8 MB, unless there are very many channels.
  const std::ptrdiff_t most = std::max<std::ptrdiff_t>(1024, (4 << 20) / out_channels / 32 * 32);
  const std::ptrdiff_t terms = batch * pixels, size = (std::ptrdiff_t)out_channels * in_channels;
  const Scratch later(terms > most ? size : 0);
  for (std::ptrdiff_t first = 0; first < terms; first += most) {
    const int slice = (int)std::min(most, terms - first);
    const Bfloat16Weights packed(out_channels, slice, [&](int row, int lanes, int term, int count, Vec* out) {
      // the terms of one image at a time
      for (int done = 0; done < count;) {
        const std::ptrdiff_t at = first + term + done, image = at / pixels, pixel = at % pixels;
        const int n = (int)std::min<std::ptrdiff_t>(count - done, pixels - pixel);
        pack(dy + (image * out_channels + row) * pixels + pixel, pixels, lanes, n, out + done);
        done += n;
      }
    });
    const TermRows rows = {x, in_channels, pixels, first};
    const Shape s = {1, slice, 1, in_channels, 1, 1};
    // A result must not be added in place: `unpack` may write an element twice.
    float* const to = first ? later.floats() : dweight;
    conv_gemm({nullptr, slice, in_channels}, packed.weights(), nullptr, nullptr, {}, nullptr, s,
              {to, out_channels, in_channels}, &rows);
    if (!first) continue;
#pragma omp parallel for
    for (std::ptrdiff_t i = 0; i < size; i++) dweight[i] += to[i];
  }
}

}  // namespace large_kernel
