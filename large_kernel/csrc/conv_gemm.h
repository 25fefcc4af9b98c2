// Dense convolution as a matrix product (implicit GEMM), mostly of 1x1 kernels, fused with the norms, activation and
// residual around it. Output channels map to SIMD lanes.
//
//   weights [C_out / 16][C_in][16]       pixels [C_in / 16][pixels][16]        tile: 7 pixels x 48 channels (AVX-512)
//   a panel of up to 3 vectors per k     packed by block of channels           21 sums; per k 3 loads, 7 broadcasts
//
// Numbers are float32, or bfloat16 or int8 in words of two or four (gemm_product.h); C_in is then the number of words, and
// a row of packed pixels or weights has 16 words whatever they hold.
//
//   for each part of about 256 pixels: pack the pixels (applying the norm before), then for each panel of channels
//       for each pass over 128 or 512 input channels, for each tile: multiply
//       write the results (applying norm, activation and residual)
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "amx.h"
#include "epilogue.h"
#include "feature_map.h"
#include "gemm_product.h"
#include "shape.h"

namespace large_kernel {

// A tile is kTilePixels pixels by up to kPanelVectors vectors of output channels. Its accumulators fill the registers.
constexpr int kTilePixels = kRegisters == 32 && kLanes == 16 ? 7 : 6;
constexpr int kPanelVectors = kRegisters == 16 ? 2 : kLanes == 16 ? 3 : 4;  // one more would spill
// panels start at multiples of this, so that they hold parts of one block or whole blocks
constexpr int kPanelUnit = std::min(kPanelVectors, kVectorsPerBlock);

// Input channels per pass. The pass's weights, kPanelVectors vectors per channel, fit in half of a large L1 cache,
// otherwise in the L2 cache.
inline int depth_per_pass() { return has_large_l1() ? 128 : 512; }

// A weight [C_out, C_in, K, K] in float32, packed in each call.
struct PlainWeights {
  typedef Float32Product Product;
  const float* data;
};

// A weight packed ahead of the call: the words [C_out / 16, rows, 16] of C_in * K * K terms, see `packed_rows`.
template <class P>
struct PackedWeights {
  typedef P Product;
  const float* data;
};

// Rows of a packed weight. Words of several numbers are filled up with zeros to whole rows of packed pixels.
template <class P>
constexpr int packed_rows(int terms) {
  if (P::kPerWord == 1) return terms;
  const int row = kWords * P::kPerWord;
  return (terms + row - 1) / row * kWords;
}

// A matrix in blocks of 16 rows or columns, `block` words apart: pixels [C_in / 16][pixels][16] or weights [C_out /
// 16][C_in][16].
struct BlockedMatrix {
  const float* data;
  std::ptrdiff_t block;
};

// Prefetches the next weights into the L2 cache, a few lines per step while tiles are multiplied; otherwise every panel
// would start by waiting for its weights. They are `streams` pieces of `bytes` bytes, `stride` bytes apart.
class WeightPrefetcher {
 public:
  WeightPrefetcher() = default;
  WeightPrefetcher(const void* data, std::ptrdiff_t stride, int streams, int bytes, int times)
      : at_(static_cast<const char*>(data)),
        stride_(stride),
        bytes_(bytes),
        streams_(streams),
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

// The sum that the i-th product of a step belongs to. With 16 registers the products of a pixel follow each other:
// otherwise GCC keeps all pixels of the tile in registers, and some of the sums in memory.
template <int V>
constexpr int nth_sum(int i) {
  return kRegisters == 16 ? i % V * kTilePixels + i / V : i;
}

template <class P, int V, int... I>
LK_INLINE void tile_step(Vec (&sum)[V * kTilePixels], const BlockedMatrix& weight, const float* x,
                         std::integer_sequence<int, I...>) {
  auto add = [&](int s) {
    const int vector = s / kTilePixels * kLanes;
    sum[s] = P::multiply_add(sum[s], load(weight.data + vector / kChannelBlock * weight.block + vector % kChannelBlock),
                             P::splat(x + s % kTilePixels * kWords));
  };
  (add(nth_sum<V>(I)), ...);
}

template <int V, int... I>
LK_INLINE void tile_load(Vec (&sum)[V * kTilePixels], const Vec* from, std::ptrdiff_t pitch,
                         std::integer_sequence<int, I...>) {
  ((sum[I] = from ? from[I / kTilePixels * pitch + I % kTilePixels] : Vec{}), ...);
}

template <int V, int... I>
LK_INLINE void tile_store(Vec (&sum)[V * kTilePixels], Vec* to, std::ptrdiff_t pitch,
                          std::integer_sequence<int, I...>) {
  ((to[I / kTilePixels * pitch + I % kTilePixels] = sum[I]), ...);
}

// to[v][p] = (add ? to[v][p] : 0) + the sum over k < depth of weight[k][v] * x[k][p]. The pixels of the next block or
// tile are prefetched, as they are too far apart for the hardware prefetcher.
template <class P, int V>
__attribute__((noinline)) void gemm_tile(BlockedMatrix weight, BlockedMatrix x, int depth, bool add, Vec* to,
                                         std::ptrdiff_t pitch, WeightPrefetcher& ahead) {
  constexpr auto all = std::make_integer_sequence<int, V * kTilePixels>{};
  Vec sum[V * kTilePixels];
  tile_load<V>(sum, add ? to : nullptr, pitch, all);
  const float* const first = x.data;
  for (; depth > 0; depth -= kWords, x.data += x.block) {
    ahead.fetch();
    const float* const next = depth > kWords ? x.data + x.block : first + kTilePixels * kWords;
#pragma GCC unroll 8
    for (int i = 0; i < kTilePixels; i++) __builtin_prefetch(next + i * kWords);
    const int count = std::min(depth, kWords);
    for (int k = 0; k < count; k++, weight.data += kChannelBlock) tile_step<P, V>(sum, weight, x.data + k, all);
  }
  tile_store<V>(sum, to, pitch, all);
}

using GemmTile = void (*)(BlockedMatrix, BlockedMatrix, int, bool, Vec*, std::ptrdiff_t, WeightPrefetcher&);

// Size of the tiles: pixels, and the most vectors of output channels.
struct TileSize {
  int pixels, vectors;
};

constexpr TileSize kSimdTile = {kTilePixels, kPanelVectors};

#if defined(LK_AMX)
template <class P, int V>
void amx_gemm_tile(BlockedMatrix weight, BlockedMatrix x, int depth, bool add, Vec* to, std::ptrdiff_t pitch,
                   WeightPrefetcher& ahead) {
  for (int k = 0; k < depth; k += kWords) ahead.fetch();
  amx_tile<P, V>(weight.data, weight.block, x.data, x.block, depth, add, to, pitch);
}
#endif

template <class P>
bool uses_amx() {
  return P::kPerWord > 1 && kLanes == kWords && has_amx();
}

template <class P>
TileSize tile_size() {
  return uses_amx<P>() ? TileSize{kAmxPixels, kAmxVectors} : kSimdTile;
}

template <class P>
GemmTile select_gemm_tile(int vectors) {
#if defined(LK_AMX)
  if constexpr (P::kPerWord > 1 && kLanes == kWords) {
    if (has_amx()) return vectors == 1 ? amx_gemm_tile<P, 1> : amx_gemm_tile<P, 2>;
  }
#endif
  static constexpr GemmTile tiles[] = {gemm_tile<P, 1>, gemm_tile<P, 2>, gemm_tile<P, std::min(3, kPanelVectors)>,
                                       gemm_tile<P, kPanelVectors>};
  return tiles[vectors - 1];
}

// The weights of `vectors` vectors of output channels starting at `channel`, and `depth` input channels starting at k.
inline BlockedMatrix panel_weights(PlainWeights weight, int in_channels, int out_channels, int channel, int vectors,
                                   int k, int depth, float* table) {
  for (int v = 0; v < vectors; v++) {
    const int first = channel + v * kLanes, in_block = v * kLanes % kChannelBlock;
    pack(weight.data + (std::ptrdiff_t)first * in_channels + k, in_channels, std::min(kLanes, out_channels - first), depth,
         reinterpret_cast<Vec*>(table + (v * kLanes - in_block) * depth + in_block), kVectorsPerBlock);
  }
  return {table, (std::ptrdiff_t)depth * kChannelBlock};
}

template <class P>
BlockedMatrix panel_weights(PackedWeights<P> weight, int in_channels, int, int channel, int, int k, int, float*) {
  const std::ptrdiff_t block = (std::ptrdiff_t)in_channels * kChannelBlock;
  return {weight.data + channel / kChannelBlock * block + channel % kChannelBlock + (std::ptrdiff_t)k * kChannelBlock,
          block};
}

// A prefetcher of the same weights where they are stored.
inline WeightPrefetcher prefetcher_of(PlainWeights weight, int in_channels, int out_channels, int channel, int vectors,
                                      int k, int depth, int times) {
  const int size = sizeof(float), rows = std::min(vectors * kLanes, out_channels - channel);
  return {weight.data + (std::ptrdiff_t)channel * in_channels + k, (std::ptrdiff_t)in_channels * size, rows,
          depth * size, times};
}

template <class P>
WeightPrefetcher prefetcher_of(PackedWeights<P> weight, int in_channels, int, int channel, int vectors, int k,
                                      int depth, int times) {
  constexpr int size = sizeof(float) * kChannelBlock;
  const std::ptrdiff_t stride = (std::ptrdiff_t)in_channels * size;
  const char* const first = reinterpret_cast<const char*>(weight.data) + channel / kChannelBlock * stride;
  return {first + k * size, stride, (vectors * kLanes + kChannelBlock - 1) / kChannelBlock, depth * size, times};
}

// Packs `count` pixels of an image, starting at `pixel`, as scale * x + shift into [C_in / 16][count][16].
inline void pack_pixels(const FeatureMap<const float>& x, int image, int pixel, int count, const float* scale,
                        const float* shift, float* out, std::ptrdiff_t block) {
  for (int channel = 0; channel < x.channels; channel += kLanes) {
    const int lanes = std::min(kLanes, x.channels - channel);
    Vec* to = reinterpret_cast<Vec*>(out + channel / kChannelBlock * block + channel % kChannelBlock);
    x.read(image, channel, lanes, pixel, count, to, kVectorsPerBlock);
    if (!scale) continue;
    const Vec a = load_lanes(scale + channel, lanes), b = load_lanes(shift + channel, lanes);
    for (int i = 0; i < count; i++) to[i * kVectorsPerBlock] = a * to[i * kVectorsPerBlock] + b;
  }
}

// The same, rounded to the elements of a product: [C_in / row][count][row], row = 16 words. Channels past the last are
// zeros.
template <class P>
void pack_rounded_pixels(const FeatureMap<const float>& x, int image, int pixel, int count, const float* scale,
                         const float* shift, float* out, std::ptrdiff_t block) {
  constexpr int row = kWords * P::kPerWord, strip = 64;  // elements, pixels
  typename P::Element* const elements = reinterpret_cast<typename P::Element*>(out);
  const std::ptrdiff_t block_elements = block * P::kPerWord;
  Vec values[strip];
  for (int channel = 0; channel < (x.channels + row - 1) / row * row; channel += kLanes) {
    const int lanes = std::min(kLanes, x.channels - channel);
    const Vec a = scale && lanes > 0 ? load_lanes(scale + channel, lanes) : splat(1.f);
    const Vec b = scale && lanes > 0 ? load_lanes(shift + channel, lanes) : Vec{};
    for (int first = 0; first < count; first += strip) {
      const int pixels = std::min(strip, count - first);
      typename P::Element* const to = elements + channel / row * block_elements + first * row + channel % row;
      if (lanes > 0) x.read(image, channel, lanes, pixel + first, pixels, values);
      for (int i = 0; i < pixels; i++) {
        const Vec v = scale ? a * values[i] + b : values[i];
        P::store(to + i * row, lanes == kLanes ? v : lanes > 0 ? keep_first(v, lanes) : Vec{});
      }
    }
  }
}

// Packs the K x K windows of `count` outputs of an image, starting at `pixel`, into [C_in * K * K / row][count][row],
// row = 16 words, in the order of a weight [C_in, K, K].
template <class P>
void im2col(const FeatureMap<const float>& x, const Shape& s, int image, int pixel, int count, float* out,
            std::ptrdiff_t block) {
  constexpr int row_size = kWords * P::kPerWord;  // elements
  const int terms = s.channels * s.kernel * s.kernel;
  for (int r = 0; r < packed_rows<P>(terms) * P::kPerWord; r++) {
    typename P::Element* to =
        reinterpret_cast<typename P::Element*>(out) + r / row_size * block * P::kPerWord + r % row_size;
    if (r >= terms) {
      for (int i = 0; i < count; i++) to[i * row_size] = 0;
      continue;
    }
    const int channel = r / (s.kernel * s.kernel);
    const int step = x.nchw16c ? kChannelBlock : 1;
    const float* plane = x.at(image, channel, 0);
    const int above = r / s.kernel % s.kernel - s.kernel / 2, left = r % s.kernel - s.kernel / 2;
    // the output columns whose input lies inside the map
    const int begin = std::max(0, s.stride - 1 - left) / s.stride;
    const int end = s.width > left ? (s.width - 1 - left) / s.stride + 1 : 0;
    int row = pixel / s.out_width(), column = pixel % s.out_width();
    for (int done = 0; done < count; row++) {
      const int last = std::min(s.out_width(), column + count - done), iy = row * s.stride + above;
      const bool inside = iy >= 0 && iy < s.height;
      const int first_inside = inside ? std::clamp(begin, column, last) : last;
      const int last_inside = inside ? std::clamp(end, first_inside, last) : last;
      done += last - column;
      const auto zeros = [&](int until) {
        for (; column < until; column++, to += row_size) *to = P::element(0.f);
      };
      zeros(first_inside);
      std::ptrdiff_t from = ((std::ptrdiff_t)iy * s.width + first_inside * s.stride + left) * step;
      for (; column < last_inside; column++, to += row_size, from += s.stride * step)
        *to = P::element(x.value(plane, from));
      zeros(last);
      column = 0;
    }
  }
}

// Maps [N, channels, pixels] whose channels take the place of pixels in a product, and whose images and pixels, counted
// from `first`, are its terms.
struct TermRows {
  const float* x;
  int channels;
  std::ptrdiff_t pixels, first;
};

// Packs `terms` terms of `count` channels, starting at `channel`, into [terms / row][count][row], row = 16 words.
template <class P>
void pack_terms(const TermRows& from, int channel, int count, int terms, float* out, std::ptrdiff_t block) {
  constexpr int row = kWords * P::kPerWord;
  const int padded = (terms + row - 1) / row * row;
  std::vector<float> values(padded);
  for (int c = 0; c < count; c++) {
    for (std::ptrdiff_t term = 0; term < terms;) {
      const std::ptrdiff_t image = (from.first + term) / from.pixels, pixel = (from.first + term) % from.pixels;
      const std::ptrdiff_t n = std::min<std::ptrdiff_t>(terms - term, from.pixels - pixel);
      std::copy_n(from.x + (image * from.channels + channel + c) * from.pixels + pixel, n, values.data() + term);
      term += n;
    }
    typename P::Element* const to = reinterpret_cast<typename P::Element*>(out) + c * row;
    for (int term = 0; term < padded; term += kLanes) {
      P::store(to + term / row * block * P::kPerWord + term % row, load(values.data() + term));
    }
  }
}

// The division of a product among threads. A part is the pixels multiplied by a panel at a time, about 256 (a chunk of
// one large map, or a group of small maps), and a range of adjacent panels: all panels, unless there are fewer parts
// than threads, which then share the pixels.
struct GemmPlan {
  struct Part {
    int image, images, first, count;  // images, and a range of pixels of each
    int first_panel, last_panel;
  };

  int batch, pixels, vectors;              // images, output pixels of an image, vectors of output channels
  TileSize tile;
  int map_tiles, chunks, tiles, group;     // tiles and chunks of a map, tiles of the largest chunk, images of a part
  int units, shares, panels_each, panels;  // of output channels; threads that share pixels, panels of each and of all
  std::ptrdiff_t parts;

  GemmPlan(int batch, int pixels, int out_channels, int threads, TileSize tile = kSimdTile)
      : batch(batch),
        pixels(pixels),
        vectors((out_channels + kLanes - 1) / kLanes),
        tile(tile) {
    map_tiles = (pixels + tile.pixels - 1) / tile.pixels;
    chunks = std::max(1, (pixels + 128) / 256);
    tiles = (map_tiles + chunks - 1) / chunks;
    group = chunks > 1 ? 1 : std::min(batch, std::max(1, 256 / (tiles * tile.pixels)));
    const std::ptrdiff_t places = (std::ptrdiff_t)((batch + group - 1) / group) * chunks;
    const int most = tile.vectors / kPanelUnit;
    units = (vectors + kPanelUnit - 1) / kPanelUnit;
    shares = (int)std::min<std::ptrdiff_t>(units, (threads + places - 1) / places);
    panels_each = ((units + shares - 1) / shares + most - 1) / most;
    panels = shares * panels_each;
    parts = places * shares;
  }

  int first_vector(int panel) const { return std::min(vectors, units * panel / panels * kPanelUnit); }

  Part part(std::ptrdiff_t index) const {
    const std::ptrdiff_t place = index / shares;
    const int chunk = place % chunks, image = (int)(place / chunks) * group;
    const int first = (int)((std::ptrdiff_t)map_tiles * chunk / chunks) * tile.pixels;
    const int last = (int)((std::ptrdiff_t)map_tiles * (chunk + 1) / chunks) * tile.pixels;
    const int first_panel = index % shares * panels_each;
    return {image,       std::min(group, batch - image), first, std::min(last, pixels) - first,
            first_panel, first_panel + panels_each};
  }
};

// The arguments of `conv_gemm`, and the steps of a part.
template <class W>
struct ConvGemm {
  typedef typename W::Product P;

  struct Buffers {
    float *packed, *table;  // pixels, weights
    Vec* sums;              // [images][vectors of a tile][pitch]
  };

  const FeatureMap<const float>& x;
  const W weight;
  const float *const in_scale, *const in_shift;
  const Epilogue& epilogue;
  const float* const residual;
  const Shape& s;
  const FeatureMap<float>& y;
  const TermRows* const transposed;  // takes the place of x
  const int threads = omp_get_max_threads();
  const TileSize tile = tile_size<P>();
  const GemmPlan plan{s.batch, (int)y.pixels, y.channels, threads, tile};
  const int rows = packed_rows<P>(s.channels * s.kernel * s.kernel);  // of the packed weight: words of each sum
  const int most_depth = depth_per_pass(), blocks = (rows + kWords - 1) / kWords;
  const int pitch = plan.tiles * tile.pixels;
  const bool pointwise = s.kernel == 1 && s.stride == 1;
  // Pixels that are already laid out as needed are not packed. The last tile then starts earlier, so as not to
  // read past the map.
  const bool in_place =
      P::kPerWord == 1 && x.nchw16c && !x.bfloat16 && pointwise && !in_scale && plan.pixels >= tile.pixels;
  // one line more than needed, or all blocks would share a few cache sets
  const std::ptrdiff_t block_size = (std::ptrdiff_t)pitch * kWords + kWords;

  // Packs the pixels of image i of a part.
  void pack_image(const GemmPlan::Part& part, int i, const Buffers& buffers) const {
    float* const to = buffers.packed + i * blocks * block_size;
    if (transposed) {
      if constexpr (P::kPerWord > 1) pack_terms<P>(*transposed, part.first, part.count, s.channels, to, block_size);
    } else if (!pointwise) {
      im2col<P>(x, s, part.image + i, part.first, part.count, to, block_size);
    } else if constexpr (P::kPerWord == 1) {
      pack_pixels(x, part.image + i, part.first, part.count, in_scale, in_shift, to, block_size);
    } else {
      pack_rounded_pixels<P>(x, part.image + i, part.first, part.count, in_scale, in_shift, to, block_size);
    }
  }

  // Multiplies the pixels of a part by the weights of a panel, into buffers.sums.
  void multiply_panel(const GemmPlan::Part& part, int panel, const Buffers& buffers) const {
    const int begin = plan.first_vector(panel), end = plan.first_vector(panel + 1);
    const GemmTile gemm_tile = select_gemm_tile<P>(end - begin);
    for (int k = 0; k < rows; k += most_depth) {
      const int depth = std::min(most_depth, rows - k);
      const BlockedMatrix w =
          panel_weights(weight, rows, y.channels, begin * kLanes, end - begin, k, depth, buffers.table);
      const int tiles = part.images * ((part.count + tile.pixels - 1) / tile.pixels);
      WeightPrefetcher ahead =
          next_weights(part, panel, k + depth, tiles * ((depth + kWords - 1) / kWords));
      for (int i = 0; i < part.images; i++) {
        BlockedMatrix in = {buffers.packed + (i * blocks + k / kWords) * block_size, block_size};
        if (in_place) in = {x.at(part.image + i, k, part.first), x.pixels * kChannelBlock};
        for (int p = 0; p < part.count; p += tile.pixels) {
          const int start = in_place ? std::min(p, part.count - tile.pixels) : p;
          gemm_tile(w, {in.data + start * kWords, in.block}, depth, k > 0,
                    buffers.sums + i * tile.vectors * pitch + p, pitch, ahead);
        }
      }
    }
    const int rest = part.count % tile.pixels;  // pixels of the last tile; unused sums are moved as well
    for (int v = 0; in_place && rest && v < part.images * tile.vectors; v++) {
      Vec* const last = buffers.sums + v * pitch + part.count - rest;
      std::copy_n(last + tile.pixels - rest, rest, last);
    }
  }

  // A prefetcher of the weights that are needed after those before row k: the panel's next pass, or the next panel,
  // which this thread most likely takes too. It is called `times` times.
  WeightPrefetcher next_weights(const GemmPlan::Part& part, int panel, int k, int times) const {
    const bool same = k < rows;
    if (!same && panel + 1 >= part.last_panel) return {};
    const int begin = plan.first_vector(same ? panel : panel + 1),
              end = plan.first_vector(same ? panel + 1 : panel + 2);
    if (!same) k = 0;
    return prefetcher_of(weight, rows, y.channels, begin * kLanes, end - begin, k, std::min(most_depth, rows - k),
                         times);
  }

  // Writes the results of a panel.
  void write_panel(const GemmPlan::Part& part, int panel, const Buffers& buffers) const {
    const int begin = plan.first_vector(panel), end = plan.first_vector(panel + 1);
    for (int v = begin; v < end; v++) {
      const int channel = v * kLanes, lanes = std::min(kLanes, y.channels - channel);
      epilogue.with_channels(channel, lanes, [&](auto finish) {
        for (int i = 0; i < part.images; i++) {
          y.write(buffers.sums + (i * tile.vectors + v - begin) * pitch, part.image + i, channel, lanes, part.first,
                  part.count, [&](Vec sum) { return finish(P::sum_value(sum)); }, residual);
        }
      });
    }
  }

  void run() const {
    const std::size_t packed_size = in_place ? 0 : (std::size_t)plan.group * blocks * block_size;
    constexpr int panel_channels = std::max(kChannelBlock, kPanelVectors * kLanes);
    const std::size_t table_size =
        !std::is_same_v<W, PlainWeights> ? 0 : (std::size_t)panel_channels * std::min(rows, most_depth);
    const std::size_t sums_size = (std::size_t)plan.group * tile.vectors * pitch;  // vectors
    const std::size_t per_thread = (packed_size + table_size + sums_size * kLanes + 15) / 16 * 16;
    Scratch scratch(per_thread * threads);
    std::vector<std::atomic<int>> taken(plan.parts);  // panels of each part
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      const AmxTiles registers(uses_amx<P>());
      float* const memory = scratch.floats() + per_thread * thread;
      const Buffers buffers = {memory, memory + packed_size, reinterpret_cast<Vec*>(memory + per_thread) - sums_size};
      // Each thread starts with its own parts, so that few pixels are packed twice, and then helps the others.
      for (std::ptrdiff_t i = 0; i < plan.parts; i++) {
        const std::ptrdiff_t index = (plan.parts * thread / threads + i) % plan.parts;
        const GemmPlan::Part part = plan.part(index);
        int packed = in_place ? part.images : 0;
        for (int panel; (panel = part.first_panel + taken[index]++) < part.last_panel;) {
          for (; packed < part.images; packed++) pack_image(part, packed, buffers);
          if (plan.first_vector(panel) == plan.first_vector(panel + 1)) continue;  // fewer units than panels
          multiply_panel(part, panel, buffers);
          write_panel(part, panel, buffers);
        }
      }
    }
  }
};

// Convolution with "same" padding of x, whose shape is `s`, with a weight [C_out, C_in, K, K], K odd, plain or packed; plus
// `residual`, laid out like y, if given. With `in_scale` and `in_shift` [C_in], for 1x1 kernels, the input is in_scale *
// x + in_shift. `transposed` takes the place of x, for products in words and without an input norm.
template <class W>
void conv_gemm(const FeatureMap<const float>& x, W weight, const float* in_scale, const float* in_shift,
               const Epilogue& epilogue, const float* residual, const Shape& s, const FeatureMap<float>& y,
               const TermRows* transposed = nullptr) {
  ConvGemm<W>{x, weight, in_scale, in_shift, epilogue, residual, s, y, transposed}.run();
}

}  // namespace large_kernel
