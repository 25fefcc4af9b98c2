// 1x1 convolution as a matrix product: output channels in vector lanes, pixels in registers, everything around it fused.
#pragma once
#include <omp.h>

#include <algorithm>
#include <utility>

#include "epilogue.h"

namespace dwconv {

struct PointwiseShape {
  int batch, in_channels, out_channels, pixels;
  // floats from one packed tile of pixels to the next; a line more than it holds, or all would share a few cache sets
  std::ptrdiff_t tile_size() const { return (std::ptrdiff_t)in_channels * 8 + 16; }
};

// A tile is kTile pixels by up to kPanel vectors of output channels; its sums fill the registers.
constexpr int kTile = kRegisters == 32 ? 7 : 6;
constexpr int kTilePitch = 8;  // floats from one input channel of a packed tile to the next
constexpr int kPanel = kRegisters == 32 ? 3 : 2;  // a fourth vector would spill
constexpr int kDepth = 512;  // input channels whose weights, kPanel vectors each, stay in the second-level cache

template <int V, int... I>
DW_INLINE void tile_step(Vec (&sum)[V * kTile], const Vec* weight, const float* x, std::integer_sequence<int, I...>) {
  ((sum[I] += weight[I / kTile] * splat(x[I % kTile])), ...);
}

template <int V, int... I>
DW_INLINE void tile_load(Vec (&sum)[V * kTile], const Vec* from, std::ptrdiff_t pitch, std::integer_sequence<int, I...>) {
  ((sum[I] = from ? from[I / kTile * pitch + I % kTile] : Vec{}), ...);
}

template <int V, int... I>
DW_INLINE void tile_store(Vec (&sum)[V * kTile], Vec* to, std::ptrdiff_t pitch, std::integer_sequence<int, I...>) {
  ((to[I / kTile * pitch + I % kTile] = sum[I]), ...);
}

// to[v][p] = (add ? to[v][p] : 0) + the sum over k < depth of weight[k][v] * x[k][p].
template <int V>
__attribute__((noinline)) void multiply_tile(const Vec* weight, const float* x, int depth, bool add, Vec* to,
                                             std::ptrdiff_t pitch) {
  constexpr auto all = std::make_integer_sequence<int, V * kTile>{};
  Vec sum[V * kTile];
  tile_load<V>(sum, add ? to : nullptr, pitch, all);
  for (; depth > 0; --depth, weight += V, x += kTilePitch) tile_step<V>(sum, weight, x, all);
  tile_store<V>(sum, to, pitch, all);
}

using MultiplyTile = void (*)(const Vec*, const float*, int, bool, Vec*, std::ptrdiff_t);

inline MultiplyTile select_tile_product(int vectors) {
  static constexpr MultiplyTile products[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<kPanel>};
  return products[vectors - 1];
}

// `count` pixels of all input channels -> tiles of [in_channels][kTilePitch]. What stands behind the last pixel is of no
// consequence: its columns of the product are not stored.
template <class T>
void pack_pixels(const T* x, const T* end, const float* scale, const float* shift, const PointwiseShape& s, int count,
                 float* out) {
  for (int k = 0; k < s.in_channels; k++, x += s.pixels, out += kTilePitch) {
    float* to = out;
    constexpr int ahead = 4;  // rows; they lie too far apart for the processor to see them coming
    for (int p = 0; k + ahead < s.in_channels && p < count; p += 64 / sizeof(T)) {
      __builtin_prefetch(x + ahead * s.pixels + p);
    }
    const Vec a = splat(scale ? scale[k] : 1.f), b = splat(shift ? shift[k] : 0.f);
    for (int p = 0; p < count; p += kTile, to += s.tile_size()) {
      for (int i = 0; i < kTilePitch; i += kLanes) {
        const std::ptrdiff_t left = end - (x + p + i);
        Vec v = left >= kLanes ? load(x + p + i) : left > 0 ? load_part(x + p + i, (int)left) : Vec{};
        v = a * v + b;
        std::memcpy(to + i, &v, std::min(kTilePitch, kLanes) * sizeof(float));
      }
    }
  }
}

// Asks for part `i` of `n` of the weights [lines of 64 bytes] of rows that the next panel will pack.
template <class T>
DW_INLINE void prefetch_rows(const T* rows, std::ptrdiff_t row_stride, int row_count, int length, int i, int n) {
  constexpr int line = 64 / sizeof(T);
  for (int row = row_count * i / n; row < row_count * (i + 1) / n; row++) {
    for (int k = 0; k < length; k += line) __builtin_prefetch(rows + row * row_stride + k, 0, 2);
  }
}

// The sums of `vectors` vectors of output channels, from `channel` on, over `tiles` packed tiles -> sums[vector][pixel].
template <class T>
void multiply_panel(const T* weight, const float* pixels, const PointwiseShape& s, int channel, int vectors, int tiles,
                    Vec* table, Vec* sums, std::ptrdiff_t pitch) {
  const MultiplyTile product = select_tile_product(vectors);
  for (int k = 0; k < s.in_channels; k += kDepth) {
    const int depth = std::min(kDepth, s.in_channels - k);
    for (int v = 0; v < vectors; v++) {
      const int first = channel + v * kLanes;
      pack(weight + (std::ptrdiff_t)first * s.in_channels + k, s.in_channels, std::min(kLanes, s.out_channels - first),
           depth, table + v, vectors);
    }
    const bool last = k + kDepth >= s.in_channels;
    const int next_row = last ? channel + vectors * kLanes : channel, next_k = last ? 0 : k + kDepth;
    const T* next = weight + (std::ptrdiff_t)next_row * s.in_channels + next_k;
    const int next_rows = std::min(kPanel * kLanes, s.out_channels - next_row);
    for (int tile = 0; tile < tiles; tile++) {
      prefetch_rows(next, s.in_channels, next_rows, std::min(kDepth, s.in_channels - next_k), tile, tiles);
      product(table, pixels + tile * s.tile_size() + k * kTilePitch, depth, k > 0, sums + tile * kTile, pitch);
    }
  }
}

// x [N, Ci, pixels], weight [Co, Ci] -> y [N, Co, pixels], plus `residual`, like y, if there is one. With `in_scale` and
// `in_shift` [Ci] the input is in_scale * x + in_shift.
template <class T>
void pointwise(const T* x, const T* weight, const float* in_scale, const float* in_shift, const Epilogue& epilogue,
               const T* residual, const PointwiseShape& s, T* y) {
  const int threads = omp_get_max_threads();
  const int vectors = (s.out_channels + kLanes - 1) / kLanes, panels = (vectors + kPanel - 1) / kPanel;
  // About 256 pixels meet the weights of a panel at once: a chunk of one large map, or several small maps.
  const int map_tiles = (s.pixels + kTile - 1) / kTile, chunks = std::max(1, (s.pixels + 128) / 256);
  const int tiles = (map_tiles + chunks - 1) / chunks, chunk = tiles * kTile;
  const int group = chunks > 1 ? 1 : std::min(s.batch, std::max(1, 256 / chunk)), pitch = group * chunk;
  const std::ptrdiff_t parts = (std::ptrdiff_t)((s.batch + group - 1) / group) * chunks;
  const std::size_t pixel_floats = (std::size_t)group * tiles * s.tile_size(), table_size = kPanel * std::min(s.in_channels, kDepth);
  const std::size_t per_thread = (pixel_floats + kLanes - 1) / kLanes * kLanes + (table_size + kPanel * pitch) * kLanes;
  Scratch scratch(per_thread * threads);
#pragma omp parallel num_threads(threads)
  {
    float* pixels = scratch.floats() + per_thread * omp_get_thread_num();
    Vec* sums = reinterpret_cast<Vec*>(pixels + per_thread) - kPanel * pitch;
    Vec* table = sums - table_size;
    std::ptrdiff_t packed = -1;
// neighbouring panels in one thread, so that the weights it asked for are the ones it needs next
#pragma omp for schedule(monotonic : guided, 1)
    for (std::ptrdiff_t task = 0; task < parts * panels; task++) {
      const std::ptrdiff_t part = task / panels;
      const int panel = task % panels, first = part % chunks * chunk, count = std::min(chunk, s.pixels - first);
      if (count <= 0) continue;
      const int image = (int)(part / chunks) * group, images = std::min(group, s.batch - image);
      for (int i = 0; packed != part && i < images; i++) {
        pack_pixels(x + (std::ptrdiff_t)(image + i) * s.in_channels * s.pixels + first,
                    x + (std::ptrdiff_t)s.batch * s.in_channels * s.pixels, in_scale, in_shift, s, count,
                    pixels + i * tiles * s.tile_size());
      }
      packed = part;
      const int begin = vectors * panel / panels, end = vectors * (panel + 1) / panels;
      multiply_panel(weight, pixels, s, begin * kLanes, end - begin, (images - 1) * tiles + (count + kTile - 1) / kTile,
                     table, sums, pitch);
      for (int v = begin; v < end; v++) {
        const int channel = v * kLanes, lanes = std::min(kLanes, s.out_channels - channel);
        epilogue.with_channels(channel, lanes, [&](auto finish) {
          for (int i = 0; i < images; i++) {
            const std::ptrdiff_t offset = ((std::ptrdiff_t)(image + i) * s.out_channels + channel) * s.pixels + first;
            unpack(sums + (std::ptrdiff_t)(v - begin) * pitch + i * chunk, count, y + offset, s.pixels, lanes, finish,
                   residual ? residual + offset : nullptr);
          }
        });
      }
    }
  }
}

}  // namespace dwconv
