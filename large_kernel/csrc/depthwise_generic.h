// Depthwise convolution of any shape, for those without a specialised kernel: large kernels at stride 2, 1x1, few
// channels, very large maps. Forward and backward, in NCHW. Pixels map to SIMD lanes; planes are copied once with a
// border of zeros.
//
//   stride 1:  0 0 p p p p p 0 0        stride 2, columns split by parity:   0 p p p 0  |  0 p p 0
//              tiles of 4 output rows share the loads of the rows that they have in common
#pragma once
#include <algorithm>
#include <cstring>

#include "depthwise_scalar.h"
#include "finite.h"
#include "work_stealing.h"

namespace large_kernel {

constexpr int kTileRows = 4;  // output rows computed together, which share loads

// A plane copied with a border of zeros, its columns split by parity for stride 2: element (row, column) of the padded
// plane is data[column % stride * phase + row * pitch + column / stride].
struct PaddedPlane {
  float* data;
  std::ptrdiff_t pitch, phase;
  int stride;

  const float* at(int row, int column) const {
    return data + (stride == 2 ? (column & 1) * phase + (column >> 1) : column) + row * pitch;
  }
};

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// One thread's memory, large enough for accesses in whole vectors and whole tiles of rows.
struct GenericWorkspace {
  std::ptrdiff_t out_pitch;
  Scratch memory;
  PaddedPlane x, dy;  // input, with a border of K / 2; output gradient, with a border of (K - 1) / stride
  Vec* weight;        // [K * K], each in all lanes
  Vec* weight_sum;    // [K * K], gradient of the weight, still to be summed over the lanes
  float *row, *out;   // K * K weights; a tile of rows in stride x stride phases and one interleaved row

  explicit GenericWorkspace(const Shape& s) : GenericWorkspace(s, Sizes(s)) {}

 private:
  struct Sizes {
    std::ptrdiff_t x_pitch, x_phase, x, dy_pitch, dy, out_pitch, out, area;
    explicit Sizes(const Shape& s) {
      const int k = s.kernel, reach = (k - 1) / s.stride, rows = round_up(s.out_height(), kTileRows);
      x_pitch = round_up(round_up(s.out_width(), kLanes) + reach, kLanes);
      x_phase = x_pitch * ((rows - 1) * s.stride + k + s.stride);
      x = x_phase * s.stride + kLanes;
      // where dx starts among padded rows and columns
      const int begin = k / 2 / s.stride, skip = k / 2 % s.stride;
      const int dx_rows = round_up((s.height + skip + s.stride - 1) / s.stride, kTileRows);
      const int dx_columns = round_up((s.width + skip + s.stride - 1) / s.stride, kLanes);
      dy_pitch = round_up(begin + dx_columns + reach, kLanes);
      dy = dy_pitch * (begin + dx_rows + reach) + kLanes;
      out_pitch = std::max(dx_columns, round_up(s.out_width(), kLanes));
      out = out_pitch * kTileRows * s.stride * s.stride + 2 * out_pitch + kLanes;
      area = k * k;
    }
  };

  GenericWorkspace(const Shape& s, const Sizes& n)
      : out_pitch(n.out_pitch),
        memory(2 * n.area * kLanes + n.x + n.dy + n.out + n.area + kLanes) {
    weight = memory.vectors();
    weight_sum = weight + n.area;
    float* p = memory.floats() + 2 * n.area * kLanes;
    std::memset(p, 0, (n.x + n.dy) * sizeof(float));
    x = {p, n.x_pitch, n.x_phase, s.stride};
    dy = {p + n.x, n.dy_pitch, 0, 1};
    out = p + n.x + n.dy;
    row = out + n.out;
  }
};

// Fills the interior of a padded plane. The border was zeroed once and remains zero, as rows are written in order and
// end in zeros.
inline void pad_plane(const float* plane, int height, int width, int border, const PaddedPlane& to) {
  const float* end = plane + (std::ptrdiff_t)height * width;
  for (int y = 0; y < height; y++) {
    const float* from = plane + (std::ptrdiff_t)y * width;
    float* row = to.data + (y + border) * to.pitch;
    if (to.stride == 1) {
      copy_row(from, width, end, row + border);
      continue;
    }
    // Column x is stored at x + border: even x in the phase of the border's parity.
    float* even = row + (border & 1) * to.phase + (border >> 1);
    float* odd = row + (~border & 1) * to.phase + ((border + 1) >> 1);
    for (int i = 0; i < width; i += 2 * kLanes) {
      Vec a, b;
      deinterleave(load_row(from + i, width - i, end), load_row(from + i + kLanes, width - i - kLanes, end), &a, &b);
      store(even + i / 2, a);
      store(odd + i / 2, b);
    }
  }
}

// ---- correlation with a [KY, KX] kernel ----

// kTileRows rows of `vectors` vectors of output, starting at padded row `row` and column `column`.
template <int KY, int KX, int S>
void correlate_tile(const PaddedPlane& in, int row, int column, const TapView& taps, float bias, int vectors,
                    float* out, std::ptrdiff_t out_pitch) {
  const float* columns[KX];
  for (int x = 0; x < KX; x++) columns[x] = in.at(row, column + x);
  for (int v = 0; v < vectors; v++) {
    Vec sum[kTileRows];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r++) sum[r] = splat(bias);
#pragma GCC unroll 16
    for (int y = 0; y < S * (kTileRows - 1) + KY; y++) {
#pragma GCC unroll 8
      for (int x = 0; x < KX; x++) {
        const Vec value = load(columns[x] + y * in.pitch + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; r++) {
          if (y - S * r >= 0 && y - S * r < KY) sum[r] += value * taps.at(y - S * r, x);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r++) store(out + r * out_pitch + v * kLanes, sum[r]);
  }
}

template <>
inline void correlate_tile<0, 0, 0>(const PaddedPlane& in, int row, int column, const TapView& taps, float bias,
                                    int vectors, float* out, std::ptrdiff_t out_pitch) {
  for (int v = 0; v < vectors; v++) {
    Vec sum[kTileRows];
    for (int r = 0; r < kTileRows; r++) sum[r] = splat(bias);
    for (int y = 0; y < taps.rows; y++) {
      for (int x = 0; x < taps.columns; x++) {
        const float* from = in.at(row + y, column + x) + v * kLanes;
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; r++) sum[r] += load(from + r * in.stride * in.pitch) * taps.at(y, x);
      }
    }
    for (int r = 0; r < kTileRows; r++) store(out + r * out_pitch + v * kLanes, sum[r]);
  }
}

using TileKernel = void (*)(const PaddedPlane&, int, int, const TapView&, float, int, float*, std::ptrdiff_t);

inline TileKernel select_tile_kernel(int ky, int kx, int stride) {
  if (ky > 5 || kx > 5) return correlate_tile<0, 0, 0>;
  switch (stride * 100 + ky * 10 + kx) {
    case 133: return correlate_tile<3, 3, 1>;
    case 155: return correlate_tile<5, 5, 1>;
    case 233: return correlate_tile<3, 3, 2>;
    case 255: return correlate_tile<5, 5, 2>;
    // The four phases of the input gradient at stride 2.
    case 111: return correlate_tile<1, 1, 1>;
    case 112: return correlate_tile<1, 2, 1>;
    case 121: return correlate_tile<2, 1, 1>;
    case 122: return correlate_tile<2, 2, 1>;
    case 123: return correlate_tile<2, 3, 1>;
    case 132: return correlate_tile<3, 2, 1>;
  }
  return correlate_tile<0, 0, 0>;
}

// ---- forward pass and gradients of one plane ----

inline void forward_plane(const float* plane, float bias, const Shape& s, GenericWorkspace& w, float* y) {
  const int k = s.kernel, height = s.out_height(), width = s.out_width();
  const std::ptrdiff_t pixels = (std::ptrdiff_t)height * width;
  pad_plane(plane, s.height, s.width, k / 2, w.x);
  const TapView taps = {w.weight, k, k, k, 1};
  const TileKernel correlate_tile = select_tile_kernel(k, k, s.stride);
  for (int row = 0; row < height; row += kTileRows) {
    correlate_tile(w.x, row * s.stride, 0, taps, bias, round_up(width, kLanes) / kLanes, w.out, w.out_pitch);
    for (int r = 0; r < std::min(kTileRows, height - row); r++) {
      write_row(w.out + r * w.out_pitch, width, y + (std::ptrdiff_t)(row + r) * width, y + pixels);
    }
  }
}

// The input gradient, for dy in w.dy. Row (and column) Y = 2 a + phase of the padded input receives dy[a - m] *
// weight[2 m + phase]: a correlation with every second tap of the rotated kernel. At stride 1 there is only phase 0.
inline void input_gradient_plane(const Shape& s, GenericWorkspace& w, float* dx) {
  const int k = s.kernel, pad = k / 2, stride = s.stride, reach = (k - 1) / stride;
  const std::ptrdiff_t pixels = (std::ptrdiff_t)s.height * s.width;
  const int start = pad / stride, skip = pad % stride;
  const int vectors = round_up((s.width + skip + stride - 1) / stride, kLanes) / kLanes;
  float* line = w.out + w.out_pitch * kTileRows * stride * stride;
  for (int a = start; stride * a < s.height + pad; a += kTileRows) {
    for (int phase = 0; phase < stride * stride; phase++) {
      // The last tap 2 m + phase <= K - 1 comes first in the rotated kernel.
      const int py = phase / stride, px = phase % stride;
      const int ny = (k - py + stride - 1) / stride, nx = (k - px + stride - 1) / stride;
      const int last = (py + stride * (ny - 1)) * k + px + stride * (nx - 1);
      const TapView taps = {w.weight + std::max(last, 0), ny, nx, -stride * k, -stride};
      select_tile_kernel(ny, nx, 1)(w.dy, a + reach + 1 - ny, start + reach + 1 - nx, taps, 0.f, vectors,
                                    w.out + phase * kTileRows * w.out_pitch, w.out_pitch);
    }
    for (int r = 0; r < kTileRows * stride; r++) {
      const int y = stride * a + r - pad;
      if (y < 0 || y >= s.height) continue;
      const float* row = w.out + (r % stride * stride * kTileRows + r / stride) * w.out_pitch;
      if (stride == 2) {
        const float* odd = row + kTileRows * w.out_pitch;
        for (int i = 0; i < vectors * kLanes; i += kLanes) {
          Vec both[2];
          interleave(load(row + i), load(odd + i), both);
          store(line + 2 * i, both[0]);
          store(line + 2 * i + kLanes, both[1]);
        }
        row = line + skip;
      }
      write_row(row, s.width, dx + (std::ptrdiff_t)y * s.width, dx + pixels);
    }
  }
}

// Adds KY rows of the weight gradient, starting at kernel row ky, to `sum`. Rows and columns past the end of dy are
// zeros.
template <int KY, int KX, int S>
void weight_gradient_tile(const PaddedPlane& x, const PaddedPlane& dy, int border, int ky, int height, int vectors,
                          Vec* sum) {
  Vec part[KY * KX];
#pragma GCC unroll 32
  for (int i = 0; i < KY * KX; i++) part[i] = sum[i];
  const float* columns[KX];
  for (int i = 0; i < KX; i++) columns[i] = x.at(ky, i);
  for (int row = 0; row < height; row += kTileRows) {
    const float* from = dy.at(row + border, border);
    for (int v = 0; v < vectors; v++) {
      Vec value[kTileRows];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; r++) value[r] = load(from + r * dy.pitch + v * kLanes);
#pragma GCC unroll 16
      for (int y = 0; y < S * (kTileRows - 1) + KY; y++) {
#pragma GCC unroll 8
        for (int i = 0; i < KX; i++) {
          const Vec other = load(columns[i] + (S * row + y) * x.pitch + v * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < kTileRows; r++) {
            if (y - S * r >= 0 && y - S * r < KY) part[(y - S * r) * KX + i] += value[r] * other;
          }
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < KY * KX; i++) sum[i] = part[i];
}

template <int K, int S>
void weight_gradient_fixed(const PaddedPlane& x, const PaddedPlane& dy, int border, int height, int vectors, Vec* sum) {
  constexpr int rows = std::min(K, (kRegisters == 32 ? 25 : 10) / K);
  int ky = 0;
  for (; ky + rows <= K; ky += rows) weight_gradient_tile<rows, K, S>(x, dy, border, ky, height, vectors, sum + ky * K);
  if constexpr (K % rows != 0) weight_gradient_tile<K % rows, K, S>(x, dy, border, ky, height, vectors, sum + ky * K);
}

inline void weight_gradient_any(const PaddedPlane& x, const PaddedPlane& dy, int border, int k, int height, int vectors,
                                Vec* sum) {
  for (int i = 0; i < k * k; i++) {
    for (int row = 0; row < height; row++) {
      const float* from = dy.at(row + border, border);
      const float* other = x.at(x.stride * row + i / k, i % k);
      for (int v = 0; v < vectors; v++) sum[i] += load(from + v * kLanes) * load(other + v * kLanes);
    }
  }
}

// Adds one plane's weight gradient to w.weight_sum, for dy in w.dy.
inline void weight_gradient_plane(const float* x, const Shape& s, GenericWorkspace& w) {
  const int k = s.kernel, border = (k - 1) / s.stride, height = s.out_height();
  const int vectors = round_up(s.out_width(), kLanes) / kLanes;
  pad_plane(x, s.height, s.width, k / 2, w.x);
  switch (k > 5 ? 0 : k * 10 + s.stride) {
    case 31: return weight_gradient_fixed<3, 1>(w.x, w.dy, border, height, vectors, w.weight_sum);
    case 32: return weight_gradient_fixed<3, 2>(w.x, w.dy, border, height, vectors, w.weight_sum);
    case 51: return weight_gradient_fixed<5, 1>(w.x, w.dy, border, height, vectors, w.weight_sum);
    case 52: return weight_gradient_fixed<5, 2>(w.x, w.dy, border, height, vectors, w.weight_sum);
    default: return weight_gradient_any(w.x, w.dy, border, k, height, vectors, w.weight_sum);
  }
}

// ---- tensors ----

// Returns whether all weights are finite; otherwise they must not be multiplied by the zeros of a border.
inline bool read_weights(const float* weight, int area, float scale, GenericWorkspace& w) {
  for (int i = 0; i < area; i++) {
    w.row[i] = scale * weight[i];
    w.weight[i] = splat(w.row[i]);
  }
  return all_finite(w.row, area);
}

inline void forward_generic(const float* x, const float* weight, const Epilogue& epilogue, const Shape& s, float* y) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const int area = s.kernel * s.kernel;
  WorkStealingTasks planes((std::ptrdiff_t)s.batch * s.channels);
#pragma omp parallel
  {
    GenericWorkspace w(s);
    planes.for_each([&](std::ptrdiff_t plane) {
      const std::ptrdiff_t channel = plane % s.channels;
      const float scale = epilogue.scale ? epilogue.scale[channel] : 1.f;
      const float shift = epilogue.shift ? epilogue.shift[channel] : 0.f;
      if (read_weights(weight + channel * area, area, scale, w)) {
        forward_plane(x + plane * in, shift, s, w, y + plane * out);
        epilogue.activate_plane(out, y + plane * out);
      } else {
        scalar_forward(x + plane * in, weight + channel * area, epilogue, channel, s, y + plane * out);
      }
    });
  }
}

// dx, dweight and dbias may be null. One thread sums a channel over the batch, in order.
inline void backward_generic(const float* x, const float* weight, const float* dy, const Shape& s, float* dx,
                             float* dweight, float* dbias) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const int area = s.kernel * s.kernel, border = (s.kernel - 1) / s.stride;
  WorkStealingTasks channels(s.channels);
#pragma omp parallel
  {
    GenericWorkspace w(s);
    channels.for_each([&](std::ptrdiff_t channel) {
      const bool finite = read_weights(weight + channel * area, area, 1.f, w);
      std::fill(w.weight_sum, w.weight_sum + area, Vec{});
      float bias_sum = 0;
      for (int image = 0; image < s.batch; image++) {
        const std::ptrdiff_t plane = image * (std::ptrdiff_t)s.channels + channel;
        pad_plane(dy + plane * out, s.out_height(), s.out_width(), border, w.dy);
        if (dx && finite) input_gradient_plane(s, w, dx + plane * in);
        if (dx && !finite) scalar_input_gradient(dy + plane * out, weight + channel * area, s, dx + plane * in);
        if (dweight) weight_gradient_plane(x + plane * in, s, w);
        if (dbias) {
          Vec sum = {};
          for (int row = 0; row < s.out_height(); row++) {
            for (int i = 0; i < s.out_width(); i += kLanes) sum += load(w.dy.at(row + border, border + i));
          }
          bias_sum += sum_lanes(sum);
        }
      }
      if (dweight) {
        for (int i = 0; i < area; i++) w.row[i] = sum_lanes(w.weight_sum[i]);
        float* to = dweight + channel * area;
        if (all_finite(w.row, area)) {
          write_row(w.row, area, to, to + area);
        } else {
          scalar_weight_gradient(x + channel * in, dy + channel * out, s, to);
        }
      }
      if (dbias) store_partial(dbias + channel, splat(bias_sum), 1);
    });
  }
}

}  // namespace large_kernel
