// Feature maps in memory, NCHW or NCHW16c, and their transposition to one vector of channels per pixel.
#pragma once
#include <algorithm>

#include "vector.h"
#include "work_stealing.h"

namespace large_kernel {

// Channels per block of NCHW16c maps and packed weights, the same on all processors.
constexpr int kChannelBlock = 16, kVectorsPerBlock = kChannelBlock / kLanes;

constexpr int kCacheLine = 16;  // floats

// A map [N, C, pixels] (NCHW), or [N, C / 16, pixels, 16] (NCHW16c) where C is a multiple of 16.
//
//   NCHW      c0: p0 p1 p2 ...          NCHW16c   p0: c0 c1 ... c15
//             c1: p0 p1 p2 ...                    p1: c0 c1 ... c15
template <class T>
struct FeatureMap {
  T* data;
  int channels;
  std::ptrdiff_t pixels;
  bool nchw16c = false;

  T* at(int image, int channel, std::ptrdiff_t pixel) const {
    const std::ptrdiff_t first = (std::ptrdiff_t)image * channels;
    return nchw16c ? data + (first + channel / kChannelBlock * kChannelBlock) * pixels + pixel * kChannelBlock +
                         channel % kChannelBlock
                   : data + (first + channel) * pixels + pixel;
  }

  // Reads `count` pixels of `lanes` channels as vectors, `step` vectors apart. `channel` is a multiple of kLanes.
  void read(int image, int channel, int lanes, std::ptrdiff_t pixel, int count, Vec* out, int step = 1) const {
    const T* from = at(image, channel, pixel);
    if (!nchw16c) return pack(from, pixels, lanes, count, out, step);
    for (int i = 0; i < count; i++) out[i * step] = load(from + i * kChannelBlock);
  }

  // Prefetches what `read` will read, or with kWritten what `write` will write; to be called while there is arithmetic
  // to do.
  template <bool kWritten>
  LK_INLINE void prefetch(int image, int channel, int lanes, std::ptrdiff_t pixel, int count) const {
    const T* const from = at(image, channel, pixel);
    const int runs = nchw16c ? 1 : lanes, size = nchw16c ? (count - 1) * kChannelBlock + kLanes : count;
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
    if (added) added += to - data;
    if (!nchw16c) return unpack(in, count, to, pixels, lanes, finish, added);
    for (int i = 0; i < count; i++) {
      const Vec v = finish(in[i]);
      store(to + i * kChannelBlock, added ? v + load(added + i * kChannelBlock) : v);
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
