// Feature maps in memory, NCHW or NCHW16c, and their transposition to one vector of channels per pixel.
#pragma once
#include <algorithm>
#include <type_traits>

#include "bfloat16.h"
#include "vector.h"
#include "work_stealing.h"

namespace large_kernel {

// Channels per block of NCHW16c maps and packed weights, the same on all processors.
constexpr int kChannelBlock = 16, kVectorsPerBlock = kChannelBlock / kLanes;

constexpr int kCacheLine = 16;  // floats

// A map [N, C, pixels] (NCHW), or [N, C / 16, pixels, 16] (NCHW16c) where C is a multiple of 16. The latter may be in
// bfloat16; `data` and the result of `at` then point to 16-bit values.
//
//   NCHW      c0: p0 p1 p2 ...          NCHW16c   p0: c0 c1 ... c15
//             c1: p0 p1 p2 ...                    p1: c0 c1 ... c15
template <class T>
struct FeatureMap {
  T* data;
  int channels;
  std::ptrdiff_t pixels;
  bool nchw16c = false, bfloat16 = false;

  T* at(int image, int channel, std::ptrdiff_t pixel) const {
    const std::ptrdiff_t first = (std::ptrdiff_t)image * channels;
    if (!nchw16c) return data + (first + channel) * pixels + pixel;
    const std::ptrdiff_t index = (first + channel / kChannelBlock * kChannelBlock) * pixels + pixel * kChannelBlock +
                                 channel % kChannelBlock;
    return bfloat16 ? reinterpret_cast<T*>(halves(data) + index) : data + index;
  }

  // The value `index` places after an address that `at` returned.
  float value(const float* from, std::ptrdiff_t index) const {
    if (!bfloat16) return from[index];
    const uint32_t bits = (uint32_t)reinterpret_cast<const Bfloat16*>(from)[index] << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }

  static auto halves(T* values) {
    return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const Bfloat16*, Bfloat16*>>(values);
  }

  // Reads `count` pixels of `lanes` channels as vectors, `step` vectors apart. `channel` is a multiple of kLanes.
  void read(int image, int channel, int lanes, std::ptrdiff_t pixel, int count, Vec* out, int step = 1) const {
    const T* from = at(image, channel, pixel);
    if (!nchw16c) return pack(from, pixels, lanes, count, out, step);
    if (bfloat16) {
      for (int i = 0; i < count; i++) out[i * step] = load_bfloat16(halves(from) + i * kChannelBlock);
    } else {
      for (int i = 0; i < count; i++) out[i * step] = load(from + i * kChannelBlock);
    }
  }

  // Prefetches what `read` will read, or with kWritten what `write` will write; to be called while there is arithmetic
  // to do.
  template <bool kWritten>
  LK_INLINE void prefetch(int image, int channel, int lanes, std::ptrdiff_t pixel, int count) const {
    const T* const from = at(image, channel, pixel);
    const int runs = nchw16c ? 1 : lanes, most = nchw16c ? (count - 1) * kChannelBlock + kLanes : count;
    const int size = bfloat16 ? (most + 1) / 2 : most;  // in floats
    for (int c = 0; c < runs; c++) {
      for (int i = 0; i < size; i += kCacheLine) __builtin_prefetch(from + c * pixels + i, kWritten);
      __builtin_prefetch(from + c * pixels + size - 1, kWritten);
    }
  }

  // The inverse of `read`: writes finish(vector), plus the values at the same place of `added`, a map of the same
  // layout, if given.
  template <class F>
  void write(const Vec* in, int image, int channel, int lanes, std::ptrdiff_t pixel, int count, F finish,
             const T* added = nullptr) const {
    T* to = at(image, channel, pixel);
    if (added) added = FeatureMap<const T>{added, channels, pixels, nchw16c, bfloat16}.at(image, channel, pixel);
    if (!nchw16c) return unpack(in, count, to, pixels, lanes, finish, added);
    if (bfloat16) return write_bfloat16(in, halves(to), count, finish, added ? FeatureMap<const T>::halves(added) : nullptr);
    for (int i = 0; i < count; i++) {
      const Vec v = finish(in[i]);
      store(to + i * kChannelBlock, added ? v + load(added + i * kChannelBlock) : v);
    }
  }

 private:
  // The sum with `added` is rounded once.
  template <class F>
  static void write_bfloat16(const Vec* in, Bfloat16* to, int count, F finish, const Bfloat16* added) {
    for (int i = 0; i < count; i++) {
      const Vec v = finish(in[i]);
      store_bfloat16(to + i * kChannelBlock, added ? v + load_bfloat16(added + i * kChannelBlock) : v);
    }
  }
};

// Copies a map into the layout of `to`.
inline void convert_layout(const FeatureMap<const float>& from, int batch, const FeatureMap<float>& to) {
  constexpr int strip = 512;  // pixels
  const int blocks = (from.channels + kLanes - 1) / kLanes;
  WorkStealingTasks tasks((std::ptrdiff_t)batch * blocks);
#pragma omp parallel
  tasks.for_each([&](std::ptrdiff_t task) {
    const int image = (int)(task / blocks), channel = (int)(task % blocks) * kLanes;
    const int lanes = std::min(kLanes, from.channels - channel);
    Vec pixels[strip];
    for (std::ptrdiff_t i = 0; i < from.pixels; i += strip) {
      const int count = (int)std::min<std::ptrdiff_t>(strip, from.pixels - i);
      from.read(image, channel, lanes, i, count, pixels);
      to.write(pixels, image, channel, lanes, i, count, Identity{});
    }
  });
}

}  // namespace large_kernel
