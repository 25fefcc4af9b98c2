// Dense convolution, of 1x1 kernels above all, as a matrix product: output channels in vector lanes, pixels in registers,
// everything around it fused.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "depthwise_large_fir.h"

namespace large_kernel {

// A tile is kTilePixels pixels by up to kPanelVectors vectors of output channels; its sums fill the registers.
constexpr int kTilePixels = kRegisters == 32 && kLanes == 16 ? 7 : 6;
constexpr int kPanelVectors = kRegisters == 16 ? 2 : kLanes == 16 ? 3 : 4;  // another vector would spill
constexpr int kPanelUnit = std::min(kPanelVectors, kVectorsPerBlock);  // a panel begins at a multiple, so as to hold parts of one block or all

// Input channels whose weights, kPanelVectors vectors each, stay in half of the first-level cache where it is large, else in the
// second-level cache.
inline int depth_per_pass() { return has_large_l1() ? 128 : 512; }

// The weight [Co / kChannelBlock, Ci * K * K, kChannelBlock] of a convolution, packed ahead of the call.
struct PackedWeights {
  const float* data;
};

// Pixels in blocks of input channels, [Ci / kChannelBlock][..][kChannelBlock], `block` floats from one to the next. Blocks of weights are
// [Co / kChannelBlock][..][kChannelBlock], `block` floats apart.
struct BlockedMatrix {
  const float* data;
  std::ptrdiff_t block;
};

// Memory that will be needed next: `streams` of `bytes` each, `stride` bytes apart. It is fetched into the second-level cache a
// few lines at a time while tiles are multiplied, or every panel would begin by waiting for its weights.
class WeightPrefetcher {
 public:
  WeightPrefetcher() = default;
  WeightPrefetcher(const void* data, std::ptrdiff_t stride, int streams, int bytes, int times)
      : at_(static_cast<const char*>(data)), stride_(stride), bytes_(bytes), streams_(streams),
        each_((streams * ((bytes + kRowLanes - 1) / kRowLanes) + times - 1) / times) {}

  // To be called `times` times.
  LK_INLINE void fetch() {
    for (int i = 0; i < each_ && streams_ > 0; i++) {
      __builtin_prefetch(at_ + done_, 0, 2);
      if ((done_ += kRowLanes) >= bytes_) at_ += stride_, streams_--, done_ = 0;
    }
  }

 private:
  static constexpr int kRowLanes = 64;
  const char* at_ = nullptr;
  std::ptrdiff_t stride_ = 0;
  int bytes_ = 0, streams_ = 0, each_ = 0, done_ = 0;
};

template <int V, int... I>
LK_INLINE void tile_step(Vec (&sum)[V * kTilePixels], const BlockedMatrix& weight, const float* x, std::integer_sequence<int, I...>) {
  ((sum[I] += load(weight.data + I / kTilePixels * kLanes / kChannelBlock * weight.block + I / kTilePixels * kLanes % kChannelBlock) *
              splat(x[I % kTilePixels * kChannelBlock])), ...);
}

template <int V, int... I>
LK_INLINE void tile_load(Vec (&sum)[V * kTilePixels], const Vec* from, std::ptrdiff_t pitch, std::integer_sequence<int, I...>) {
  ((sum[I] = from ? from[I / kTilePixels * pitch + I % kTilePixels] : Vec{}), ...);
}

template <int V, int... I>
LK_INLINE void tile_store(Vec (&sum)[V * kTilePixels], Vec* to, std::ptrdiff_t pitch, std::integer_sequence<int, I...>) {
  ((to[I / kTilePixels * pitch + I % kTilePixels] = sum[I]), ...);
}

// to[v][p] = (add ? to[v][p] : 0) + the sum over k < depth of weight[k][v] * x[k][p]. The pixels of the next block, or of the
// next tile, are asked for ahead: their lines lie too far apart for the processor to guess.
template <int V>
__attribute__((noinline)) void gemm_tile(BlockedMatrix weight, BlockedMatrix x, int depth, bool add, Vec* to, std::ptrdiff_t pitch,
                                             WeightPrefetcher& ahead) {
  constexpr auto all = std::make_integer_sequence<int, V * kTilePixels>{};
  Vec sum[V * kTilePixels];
  tile_load<V>(sum, add ? to : nullptr, pitch, all);
  const float* const first = x.data;
  for (; depth > 0; depth -= kChannelBlock, x.data += x.block) {
    ahead.fetch();
    const float* const next = depth > kChannelBlock ? x.data + x.block : first + kTilePixels * kChannelBlock;
#pragma GCC unroll 8
    for (int i = 0; i < kTilePixels; i++) __builtin_prefetch(next + i * kChannelBlock);
    const int count = std::min(depth, kChannelBlock);
    for (int k = 0; k < count; k++, weight.data += kChannelBlock) tile_step<V>(sum, weight, x.data + k, all);
  }
  tile_store<V>(sum, to, pitch, all);
}

using GemmTile = void (*)(BlockedMatrix, BlockedMatrix, int, bool, Vec*, std::ptrdiff_t, WeightPrefetcher&);

inline GemmTile select_gemm_tile(int vectors) {
  static constexpr GemmTile tiles[] = {gemm_tile<1>, gemm_tile<2>, gemm_tile<std::min(3, kPanelVectors)>,
                                              gemm_tile<kPanelVectors>};
  return tiles[vectors - 1];
}

// Weights of `vectors` vectors of output channels from `channel` on, of `depth` input channels from k on.
inline BlockedMatrix panel_weights(const float* weight, int in_channels, int out_channels, int channel, int vectors, int k, int depth,
                            float* table) {
  for (int v = 0; v < vectors; v++) {
    const int first = channel + v * kLanes, in_block = v * kLanes % kChannelBlock;
    pack(weight + (std::ptrdiff_t)first * in_channels + k, in_channels, std::min(kLanes, out_channels - first), depth,
         reinterpret_cast<Vec*>(table + (v * kLanes - in_block) * depth + in_block), kVectorsPerBlock);
  }
  return {table, (std::ptrdiff_t)depth * kChannelBlock};
}

inline BlockedMatrix panel_weights(PackedWeights weight, int in_channels, int, int channel, int, int k, int, float*) {
  const std::ptrdiff_t block = (std::ptrdiff_t)in_channels * kChannelBlock;
  return {weight.data + channel / kChannelBlock * block + channel % kChannelBlock + (std::ptrdiff_t)k * kChannelBlock, block};
}

// The same weights where they lie.
inline WeightPrefetcher prefetcher_of(const float* weight, int in_channels, int out_channels, int channel, int vectors, int k, int depth,
                      int times) {
  const int size = sizeof(float), rows = std::min(vectors * kLanes, out_channels - channel);
  return {weight + (std::ptrdiff_t)channel * in_channels + k, (std::ptrdiff_t)in_channels * size, rows, depth * size, times};
}

inline WeightPrefetcher prefetcher_of(PackedWeights weight, int in_channels, int, int channel, int vectors, int k, int depth, int times) {
  constexpr int size = sizeof(float) * kChannelBlock;
  const std::ptrdiff_t stride = (std::ptrdiff_t)in_channels * size;
  const char* const first = reinterpret_cast<const char*>(weight.data) + channel / kChannelBlock * stride;
  return {first + k * size, stride, (vectors * kLanes + kChannelBlock - 1) / kChannelBlock, depth * size, times};
}

// `count` pixels of an image from `pixel` on, as scale * x + shift -> [Ci / kChannelBlock][count][kChannelBlock].
inline void pack_pixels(const FeatureMap<const float>& x, int image, int pixel, int count, const float* scale, const float* shift,
                        float* out, std::ptrdiff_t block) {
  for (int channel = 0; channel < x.channels; channel += kLanes) {
    const int lanes = std::min(kLanes, x.channels - channel);
    Vec* to = reinterpret_cast<Vec*>(out + channel / kChannelBlock * block + channel % kChannelBlock);
    x.read(image, channel, lanes, pixel, count, to, kVectorsPerBlock);
    if (!scale) continue;
    const Vec a = load_lanes(scale + channel, lanes), b = load_lanes(shift + channel, lanes);
    for (int i = 0; i < count; i++) to[i * kVectorsPerBlock] = a * to[i * kVectorsPerBlock] + b;
  }
}

// What `count` outputs of an image from `pixel` on see through a window of K x K inputs, in the order of a weight
// [Ci, K, K] -> [Ci * K * K / kChannelBlock][count][kChannelBlock].
inline void im2col(const FeatureMap<const float>& x, const Shape& s, int image, int pixel, int count, float* out,
                         std::ptrdiff_t block) {
  for (int r = 0; r < s.channels * s.kernel * s.kernel; r++) {
    const float* plane = x.at(image, r / (s.kernel * s.kernel), 0);
    const int step = x.nchw16c ? kChannelBlock : 1;
    const int above = r / s.kernel % s.kernel - s.kernel / 2, left = r % s.kernel - s.kernel / 2;
    float* to = out + r / kChannelBlock * block + r % kChannelBlock;
    int row = pixel / s.out_width(), column = pixel % s.out_width();
    for (int i = 0; i < count; i++, to += kChannelBlock) {
      const int iy = row * s.stride + above, ix = column * s.stride + left;
      const bool inside = iy >= 0 && iy < s.height && ix >= 0 && ix < s.width;
      *to = inside ? plane[((std::ptrdiff_t)iy * s.width + ix) * step] : 0.f;
      if (++column == s.out_width()) column = 0, row++;
    }
  }
}

// Convolution with "same" padding of x, whose shape is `s`, with a weight [Co, Ci, K, K], K odd, or a packed one, plus
// `residual`, a map like y, if there is one. With `in_scale` and `in_shift` [Ci], for 1x1 kernels, the input is
// in_scale * x + in_shift.
template <class W>
void conv_gemm(const FeatureMap<const float>& x, W weight, const float* in_scale, const float* in_shift, const Epilogue& epilogue,
           const float* residual, const Shape& s, const FeatureMap<float>& y) {
  const int most_depth = depth_per_pass(), threads = omp_get_max_threads(), pixels = (int)y.pixels, batch = s.batch;
  const int terms = s.channels * s.kernel * s.kernel;  // of each sum: rows of the weight
  const int vectors = (y.channels + kLanes - 1) / kLanes;
  // A part is the pixels that meet the weights of a panel at once, about 256: a chunk of one large map, or several small ones.
  const int map_tiles = (pixels + kTilePixels - 1) / kTilePixels;
  const int chunks = std::max(1, (pixels + 128) / 256);
  const int tiles = (map_tiles + chunks - 1) / chunks;
  const int group = chunks > 1 ? 1 : std::min(batch, std::max(1, 256 / (tiles * kTilePixels)));
  const std::ptrdiff_t places = (std::ptrdiff_t)((batch + group - 1) / group) * chunks;
  // Where there are fewer of them than threads, these share the panels: each has as many, which are neighbours.
  const int units = (vectors + kPanelUnit - 1) / kPanelUnit, most = kPanelVectors / kPanelUnit;
  const int shares = (int)std::min<std::ptrdiff_t>(units, (threads + places - 1) / places);
  const int panels_each = ((units + shares - 1) / shares + most - 1) / most, panels = shares * panels_each;
  auto first_vector = [&](int panel) { return std::min(vectors, units * panel / panels * kPanelUnit); };
  const std::ptrdiff_t parts = places * shares;
  // Pixels that stand as they are needed are not copied. There the last tile begins earlier, not to reach behind the map.
  const bool pointwise = s.kernel == 1 && s.stride == 1;
  const bool in_place = x.nchw16c && pointwise && !in_scale && pixels >= kTilePixels;
  const int in_blocks = (terms + kChannelBlock - 1) / kChannelBlock, pitch = tiles * kTilePixels;
  // a line more than it holds, or all blocks would share a few cache sets
  const std::ptrdiff_t copy_block = (std::ptrdiff_t)pitch * kChannelBlock + kChannelBlock;
  const std::size_t copied = in_place ? 0 : (std::size_t)group * in_blocks * copy_block;
  constexpr int panel_channels = std::max(kChannelBlock, kPanelVectors * kLanes);
  const std::size_t table_size = std::is_same_v<W, PackedWeights> ? 0 : (std::size_t)panel_channels * std::min(terms, most_depth);
  const std::size_t per_thread = (copied + table_size + (std::size_t)group * kPanelVectors * pitch * kLanes + 15) / 16 * 16;
  Scratch scratch(per_thread * threads);
  std::vector<std::atomic<int>> taken(parts);  // panels of each part
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    float* const copy = scratch.floats() + per_thread * thread;
    float* const table = copy + copied;
    Vec* const sums = reinterpret_cast<Vec*>(copy + per_thread) - group * kPanelVectors * pitch;
    // Each thread begins with parts of its own, so that few pixels are packed twice, and ends by helping others.
    for (std::ptrdiff_t i = 0; i < parts; i++) {
      const std::ptrdiff_t part = (parts * thread / threads + i) % parts;
      const std::ptrdiff_t place = part / shares;
      const int chunk = place % chunks, image = (int)(place / chunks) * group, images = std::min(group, batch - image);
      const int first_panel = part % shares * panels_each, last_panel = first_panel + panels_each;
      const int first = (int)((std::ptrdiff_t)map_tiles * chunk / chunks) * kTilePixels;
      const int last = (int)((std::ptrdiff_t)map_tiles * (chunk + 1) / chunks) * kTilePixels, count = std::min(last, pixels) - first;
      for (int panel, packed = in_place ? images : 0; (panel = first_panel + taken[part]++) < last_panel;) {
        for (; packed < images; packed++) {
          float* to = copy + packed * in_blocks * copy_block;
          if (pointwise) {
            pack_pixels(x, image + packed, first, count, in_scale, in_shift, to, copy_block);
          } else {
            im2col(x, s, image + packed, first, count, to, copy_block);
          }
        }
        const int begin = first_vector(panel), end = first_vector(panel + 1);
        if (begin == end) continue;  // fewer units than panels
        const GemmTile gemm_tile = select_gemm_tile(end - begin);
        for (int k = 0; k < terms; k += most_depth) {
          const int depth = std::min(most_depth, terms - k);
          const BlockedMatrix w = panel_weights(weight, terms, y.channels, begin * kLanes, end - begin, k, depth, table);
          // most likely this thread takes the next panel too
          const bool same = k + depth < terms;
          const int next = same ? begin : end, next_k = same ? k + depth : 0, next_depth = std::min(most_depth, terms - next_k);
          const int next_vectors = (same ? end : first_vector(panel + 2)) - next;
          const int times = images * ((count + kTilePixels - 1) / kTilePixels) * ((depth + kChannelBlock - 1) / kChannelBlock);
          WeightPrefetcher ahead;
          if (same || panel + 1 < last_panel) {
            ahead = prefetcher_of(weight, terms, y.channels, next * kLanes, next_vectors, next_k, next_depth, times);
          }
          for (int i = 0; i < images; i++) {
            BlockedMatrix in = {copy + (i * in_blocks + k / kChannelBlock) * copy_block, copy_block};
            if (in_place) in = {x.at(image + i, k, first), x.pixels * kChannelBlock};
            for (int p = 0; p < count; p += kTilePixels) {
              const int start = in_place ? std::min(p, count - kTilePixels) : p;
              gemm_tile(w, {in.data + start * kChannelBlock, in.block}, depth, k > 0, sums + i * kPanelVectors * pitch + p, pitch, ahead);
            }
          }
        }
        const int rest = count % kTilePixels;  // pixels of the last tile; unused sums move with the others
        for (int v = 0; in_place && rest && v < images * kPanelVectors; v++) {
          Vec* last = sums + v * pitch + count - rest;
          std::copy_n(last + kTilePixels - rest, rest, last);
        }
        for (int v = begin; v < end; v++) {
          const int channel = v * kLanes, lanes = std::min(kLanes, y.channels - channel);
          epilogue.with_channels(channel, lanes, [&](auto finish) {
            for (int i = 0; i < images; i++) {
              y.write(sums + (i * kPanelVectors + v - begin) * pitch, image + i, channel, lanes, first, count, finish, residual);
            }
          });
        }
      }
    }
  }
}

}  // namespace large_kernel
