// Feature maps in memory, and the way between them and one vector of channels per pixel.
#pragma once
#include <algorithm>

#include "work_stealing.h"
#include "vector.h"

namespace large_kernel {

// Channels that stand together in blocked maps and packed weights, on every processor alike.
constexpr int kChannelBlock = 16, kVectorsPerBlock = kChannelBlock / kLanes;

constexpr int kCacheLine = 16;  // floats

// Planes [N, C, pixels], or blocks [N, C / kChannelBlock, pixels, kChannelBlock], for which C is a multiple of kChannelBlock.
template <class T>
struct FeatureMap {
  T* data;
  int channels;
  std::ptrdiff_t pixels;
  bool nchw16c = false;

  T* at(int image, int channel, std::ptrdiff_t pixel) const {
    const std::ptrdiff_t first = (std::ptrdiff_t)image * channels;
    return nchw16c ? data + (first + channel / kChannelBlock * kChannelBlock) * pixels + pixel * kChannelBlock + channel % kChannelBlock
                   : data + (first + channel) * pixels + pixel;
  }

  // `count` pixels from `pixel` on of `lanes` channels from `channel` on, a multiple of kLanes -> vectors, `step` apart.
  void read(int image, int channel, int lanes, std::ptrdiff_t pixel, int count, Vec* out, int step = 1) const {
    const T* from = at(image, channel, pixel);
    if (!nchw16c) return pack(from, pixels, lanes, count, out, step);
    for (int i = 0; i < count; i++) out[i * step] = load(from + i * kChannelBlock);
  }

  // Prefetches what `read` is going to read, or with kWritten `write` to write: to be called while there is something else to do.
  template <bool kWritten>
  LK_INLINE void prefetch(int image, int channel, int lanes, std::ptrdiff_t pixel, int count) const {
    const T* const from = at(image, channel, pixel);
    const int runs = nchw16c ? 1 : lanes, size = nchw16c ? (count - 1) * kChannelBlock + kLanes : count;
    for (int c = 0; c < runs; c++) {
      for (int i = 0; i < size; i += kCacheLine) __builtin_prefetch(from + c * pixels + i, kWritten);
      __builtin_prefetch(from + c * pixels + size - 1, kWritten);
    }
  }

  // The inverse: writes finish(vector), plus what stands there in `added`, a map like this one, if there is one.
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

// The same values in the layout of `to`.
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
