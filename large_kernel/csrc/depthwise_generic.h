// Everything else (stride 2 with large kernels, few channels, very large maps): pixels of a row in vector lanes, over planes
// copied once with a border of zeros.
#pragma once
#include <cmath>
#include <numeric>

#include "depthwise_large_fir.h"

namespace large_kernel {

constexpr int kTileRows = 4;  // output rows computed together, sharing loads

// A plane copied with a border of zeros, its columns split by parity for stride 2: element (row, column) of the bordered
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

// Memory of one thread. Whole vectors and whole tiles of rows stay inside.
struct GenericWorkspace {
  std::ptrdiff_t out_pitch;
  Scratch memory;
  PaddedPlane x, dy;      // input, with a border of K / 2; output gradient, with a border of (K - 1) / stride
  Vec* weight;         // [K * K], each in all lanes
  Vec* weight_sum;     // [K * K], gradient of the weight, to be summed over the lanes
  float *row, *out;    // K * K weights; a tile of rows in stride x stride phases and one interleaved row

  explicit GenericWorkspace(const Shape& s) : GenericWorkspace(s, Sizes(s)) {}

 private:
  struct Sizes {
    std::ptrdiff_t x_pitch, x_phase, x, dy_pitch, dy, out_pitch, out, area;
    explicit Sizes(const Shape& s) {
      const int k = s.kernel, reach = (k - 1) / s.stride, rows = round_up(s.out_height(), kTileRows);
      x_pitch = round_up(round_up(s.out_width(), kLanes) + reach, kLanes);
      x_phase = x_pitch * ((rows - 1) * s.stride + k + s.stride);
      x = x_phase * s.stride + kLanes;
      const int begin = k / 2 / s.stride, skip = k / 2 % s.stride;  // where dx starts among bordered rows and columns
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
      : out_pitch(n.out_pitch), memory(2 * n.area * kLanes + n.x + n.dy + n.out + n.area + kLanes) {
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

// Fills the interior of a bordered plane; the border was zeroed once and stays so, as rows are written in order and end
// in zeros.
inline void pad_plane(const float* plane, int height, int width, int border, const PaddedPlane& to) {
  const float* end = plane + (std::ptrdiff_t)height * width;
  for (int y = 0; y < height; y++) {
    const float* from = plane + (std::ptrdiff_t)y * width;
    float* row = to.data + (y + border) * to.pitch;
    if (to.stride == 1) {
      copy_row(from, width, end, row + border);
      continue;
    }
    // Column x lies at x + border: even x in the phase of the border's parity.
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

// ---- correlation with a [KY, KX] kernel whose entries are `row_step` and `column_step` apart ----

struct TapView {
  const Vec* weight;
  int rows, columns, row_step, column_step;
  const Vec& at(int y, int x) const { return weight[y * row_step + x * column_step]; }
};

// kTileRows rows of `vectors` vectors of output, from bordered row `row` and column `column` on.
template <int KY, int KX, int S>
void correlate_tile(const PaddedPlane& in, int row, int column, const TapView& taps, float bias, int vectors, float* out,
          std::ptrdiff_t out_pitch) {
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
inline void correlate_tile<0, 0, 0>(const PaddedPlane& in, int row, int column, const TapView& taps, float bias, int vectors, float* out,
                          std::ptrdiff_t out_pitch) {
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

// ---- exact scalar versions, for when a value that is not finite would meet a zero of the border ----

// Calls f(index of the output pixel, of the input pixel, of the tap) for every tap that does not fall on padding.
template <class F>
LK_INLINE void for_each_tap(const Shape& s, F f) {
  const int k = s.kernel, pad = k / 2;
  for (int oy = 0; oy < s.out_height(); oy++) {
    for (int ox = 0; ox < s.out_width(); ox++) {
      for (int ky = 0; ky < k; ky++) {
        for (int kx = 0; kx < k; kx++) {
          const int iy = oy * s.stride + ky - pad, ix = ox * s.stride + kx - pad;
          if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
          f((std::ptrdiff_t)oy * s.out_width() + ox, (std::ptrdiff_t)iy * s.width + ix, ky * k + kx);
        }
      }
    }
  }
}

inline bool all_finite(const float* p, int count) {
  for (int i = 0; i < count; i++) {
    if (!std::isfinite(p[i])) return false;
  }
  return true;
}

inline void scalar_forward(const float* x, const float* weight, const Epilogue& epilogue, std::ptrdiff_t channel,
                          const Shape& s, float* y) {
  const float scale = epilogue.scale ? epilogue.scale[channel] : 1.f, shift = epilogue.shift ? epilogue.shift[channel] : 0.f;
  const std::ptrdiff_t pixels = (std::ptrdiff_t)s.out_height() * s.out_width();
  Scratch exact(pixels + kLanes);
  float* sum = exact.floats();
  std::fill(sum, sum + pixels, shift);
  for_each_tap(s, [&](auto o, auto i, int tap) { sum[o] += x[i] * (scale * weight[tap]); });
  write_row(sum, (int)pixels, y, y + pixels);
  epilogue.activate_plane(pixels, y);
}

inline void scalar_input_gradient(const float* dy, const float* weight, const Shape& s, float* dx) {
  const std::ptrdiff_t pixels = (std::ptrdiff_t)s.height * s.width;
  Scratch exact(pixels + kLanes);
  float* sum = exact.floats();
  std::fill(sum, sum + pixels, 0.f);
  for_each_tap(s, [&](auto o, auto i, int tap) { sum[i] += dy[o] * weight[tap]; });
  write_row(sum, (int)pixels, dx, dx + pixels);
}

// Of one channel over the batch; x and dy point to its first plane.
inline void scalar_weight_gradient(const float* x, const float* dy, const Shape& s, float* dweight) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const int area = s.kernel * s.kernel;
  Scratch exact(area + kLanes);
  float* sum = exact.floats();
  std::fill(sum, sum + area, 0.f);
  for (std::ptrdiff_t image = 0; image < s.batch; image++, x += s.channels * in, dy += s.channels * out) {
    for_each_tap(s, [&](auto o, auto i, int tap) { sum[tap] += dy[o] * x[i]; });
  }
  write_row(sum, area, dweight, dweight + area);
}

// ---- the three passes over one plane ----

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

// dy stands in w.dy. Row and column Y = 2 a + phase of the bordered input receive dy[a - m] * weight[2 m + phase], which
// is a correlation with every second tap of the rotated kernel; the same at stride 1 with the one phase 0.
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

// Adds KY rows of the weight gradient, from kernel row ky on, to sum. Rows and columns of dy behind the last are zeros.
template <int KY, int KX, int S>
void weight_gradient_tile(const PaddedPlane& x, const PaddedPlane& dy, int border, int ky, int height, int vectors, Vec* sum) {
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

// Adds one plane's weight gradient to w.weight_sum; dy stands in w.dy.
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

// ---- whole tensors ----

LK_INLINE float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  v += LK_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += LK_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += LK_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] + v[1];
#else
  float sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += v[lane];
  return sum;
#endif
}

// Whether all are finite; if not, zeros of a border must not be multiplied with them.
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

// dx, dweight and dbias may be null. One thread sums a channel over the batch, in its order.
inline void backward_generic(const float* x, const float* weight, const float* dy, const Shape& s, float* dx, float* dweight,
                          float* dbias) {
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
