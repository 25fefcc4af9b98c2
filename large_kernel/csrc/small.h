// Small kernels and stride 2: pixels of a row in vector lanes, over planes copied once with a border of zeros.
// These are bound by memory, so one pass reads a plane, and a plane and its copy stay in the second-level cache.
#pragma once
#include <cmath>

#include "large.h"

namespace dwconv {

constexpr int kTileRows = 4;  // output rows computed together, sharing loads

// A plane copied with a border of zeros, its columns split by parity for stride 2: element (row, column) of the bordered
// plane is data[column % stride * phase + row * pitch + column / stride].
struct Bordered {
  float* data;
  std::ptrdiff_t pitch, phase;
  int stride;

  const float* at(int row, int column) const {
    return data + (stride == 2 ? (column & 1) * phase + (column >> 1) : column) + row * pitch;
  }
};

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Sizes of the bordered copies for a shape; reads of whole vectors and whole tiles stay inside.
struct Sizes {
  std::ptrdiff_t x_pitch, x_phase, x_size;     // bordered input, `stride` phases
  std::ptrdiff_t dy_pitch, dy_size;            // bordered output gradient
  std::ptrdiff_t out_pitch, out_size;          // a tile of rows, `stride` x `stride` phases, and one interleaved row

  explicit Sizes(const Shape& s) {
    const int k = s.kernel, reach = (k - 1) / s.stride, rows = round_up(s.out_height(), kTileRows);
    x_pitch = round_up(round_up(s.out_width(), kLanes) + reach, kLanes);
    x_phase = x_pitch * ((rows - 1) * s.stride + k + s.stride);
    x_size = x_phase * s.stride;
    const int begin = k / 2 / s.stride, skip = k / 2 % s.stride;  // where dx starts among the bordered rows and columns
    const int dx_rows = round_up((s.height + skip + s.stride - 1) / s.stride, kTileRows);
    const int dx_columns = round_up((s.width + skip + s.stride - 1) / s.stride, kLanes);
    dy_pitch = round_up(begin + dx_columns + reach, kLanes);
    dy_size = dy_pitch * (begin + dx_rows + reach);
    out_pitch = std::max(dx_columns, round_up(s.out_width(), kLanes));
    out_size = out_pitch * kTileRows * s.stride * s.stride + 2 * out_pitch + k;
  }
};

template <class T>
DW_INLINE void copy_row(const T* from, int count, float* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

DW_INLINE void copy_row(const float* from, int count, float* to) { std::memcpy(to, from, count * sizeof(float)); }

template <class T>
DW_INLINE void write_row(const float* from, int count, T* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

DW_INLINE void write_row(const float* from, int count, float* to) { std::memcpy(to, from, count * sizeof(float)); }

// Fills the interior of a bordered plane; the border was zeroed once and stays so.
template <class T>
void copy_plane(const T* plane, int height, int width, int border, const Bordered& to, float* row_buffer) {
  for (int y = 0; y < height; y++) {
    const T* from = plane + (std::ptrdiff_t)y * width;
    float* row = to.data + (y + border) * to.pitch;
    if (to.stride == 1) {
      copy_row(from, width, row + border);
      continue;
    }
    // Column x lies at x + border: even x in the phase of the border's parity.
    copy_row(from, width, row_buffer);
    float* even = row + (border & 1) * to.phase + (border >> 1);
    float* odd = row + (~border & 1) * to.phase + ((border + 1) >> 1);
    const int pairs = width / 2;
    for (int i = 0; i < pairs; i++) even[i] = row_buffer[2 * i];
    for (int i = 0; i < pairs; i++) odd[i] = row_buffer[2 * i + 1];
    if (width & 1) even[pairs] = row_buffer[width - 1];
  }
}

// ---- correlation with a [KY, KX] kernel whose entries are `row_step` and `column_step` apart ----

struct Taps {
  const float* weight;
  int rows, columns, row_step, column_step;
  float at(int y, int x) const { return weight[y * row_step + x * column_step]; }
};

// kTileRows rows of `vectors` vectors of output, from bordered row `row` and column `column` on.
template <int KY, int KX, int S>
void tile(const Bordered& in, int row, int column, const Taps& taps, float bias, int vectors, float* out,
          std::ptrdiff_t out_pitch) {
  Vec weight[KY * KX];
  for (int i = 0; i < KY * KX; i++) weight[i] = splat(taps.at(i / KX, i % KX));
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
          if (y - S * r >= 0 && y - S * r < KY) sum[r] += value * weight[(y - S * r) * KX + x];
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r++) store(out + r * out_pitch + v * kLanes, sum[r]);
  }
}

template <>
inline void tile<0, 0, 0>(const Bordered& in, int row, int column, const Taps& taps, float bias, int vectors, float* out,
                          std::ptrdiff_t out_pitch) {
  for (int v = 0; v < vectors; v++) {
    Vec sum[kTileRows];
    for (int r = 0; r < kTileRows; r++) sum[r] = splat(bias);
    for (int y = 0; y < taps.rows; y++) {
      for (int x = 0; x < taps.columns; x++) {
        const float* from = in.at(row + y, column + x) + v * kLanes;
        const Vec weight = splat(taps.at(y, x));
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; r++) sum[r] += load(from + r * in.stride * in.pitch) * weight;
      }
    }
    for (int r = 0; r < kTileRows; r++) store(out + r * out_pitch + v * kLanes, sum[r]);
  }
}

using Tile = void (*)(const Bordered&, int, int, const Taps&, float, int, float*, std::ptrdiff_t);

inline Tile select_tile(int ky, int kx, int stride) {
  if (ky > 5 || kx > 5) return tile<0, 0, 0>;
  switch (stride * 100 + ky * 10 + kx) {
    case 133: return tile<3, 3, 1>;
    case 155: return tile<5, 5, 1>;
    case 233: return tile<3, 3, 2>;
    case 255: return tile<5, 5, 2>;
    // The four phases of the input gradient at stride 2.
    case 111: return tile<1, 1, 1>;
    case 112: return tile<1, 2, 1>;
    case 121: return tile<2, 1, 1>;
    case 122: return tile<2, 2, 1>;
    case 123: return tile<2, 3, 1>;
    case 132: return tile<3, 2, 1>;
  }
  return tile<0, 0, 0>;
}

// ---- exact scalar versions of one plane, for when a non-finite value would meet a zero of the border ----

template <class F>
DW_INLINE void for_each_tap(const Shape& s, F f) {
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

// ---- the three passes over one plane ----

// Memory of one thread.
struct Workspace {
  Sizes sizes;
  Scratch memory;
  Bordered x, dy;
  float *weight, *flipped, *sum, *out;

  explicit Workspace(const Shape& s)
      : sizes(s), memory(sizes.x_size + sizes.dy_size + sizes.out_size + 3 * s.kernel * s.kernel + kLanes) {
    const int area = s.kernel * s.kernel;
    float* p = memory.floats();
    std::memset(p, 0, (sizes.x_size + sizes.dy_size) * sizeof(float));
    x = {p, sizes.x_pitch, sizes.x_phase, s.stride};
    p += sizes.x_size;
    dy = {p, sizes.dy_pitch, 0, 1};
    p += sizes.dy_size;
    out = p;
    p += sizes.out_size;
    weight = p;
    flipped = p + area;
    sum = p + 2 * area;
  }
};

template <class T>
void forward_plane(const T* plane, float bias, const Shape& s, Workspace& w, T* y) {
  const int k = s.kernel, area = k * k, height = s.out_height(), width = s.out_width();
  if (!all_finite(w.weight, area)) {
    Scratch exact((std::ptrdiff_t)height * width);
    std::fill(exact.floats(), exact.floats() + (std::ptrdiff_t)height * width, bias);
    for_each_tap(s, [&](auto o, auto i, int tap) { exact.floats()[o] += to_float(plane + i) * w.weight[tap]; });
    write_row(exact.floats(), height * width, y);
    return;
  }
  copy_plane(plane, s.height, s.width, k / 2, w.x, w.out);
  const Taps taps = {w.weight, k, k, k, 1};
  const Tile tile = select_tile(k, k, s.stride);
  for (int row = 0; row < height; row += kTileRows) {
    tile(w.x, row * s.stride, 0, taps, bias, round_up(width, kLanes) / kLanes, w.out, w.sizes.out_pitch);
    for (int r = 0; r < std::min(kTileRows, height - row); r++) {
      write_row(w.out + r * w.sizes.out_pitch, width, y + (std::ptrdiff_t)(row + r) * width);
    }
  }
}

// dy stands in w.dy with a border of (K - 1) / stride. Row and column Y = 2 a + phase of the bordered input receive
// dy[a - m] * weight[2 m + phase], which is a correlation with every second tap of the rotated kernel; the same at
// stride 1 with the one phase 0.
template <class T>
void input_gradient_plane(const T* dy, const Shape& s, Workspace& w, T* dx) {
  const int k = s.kernel, area = k * k, pad = k / 2, stride = s.stride, reach = (k - 1) / stride;
  if (!all_finite(w.weight, area)) {
    Scratch exact((std::ptrdiff_t)s.height * s.width);
    std::fill(exact.floats(), exact.floats() + (std::ptrdiff_t)s.height * s.width, 0.f);
    for_each_tap(s, [&](auto o, auto i, int tap) { exact.floats()[i] += to_float(dy + o) * w.weight[tap]; });
    write_row(exact.floats(), s.height * s.width, dx);
    return;
  }
  std::reverse_copy(w.weight, w.weight + area, w.flipped);
  const std::ptrdiff_t pitch = w.sizes.out_pitch;
  const int start = pad / stride, skip = pad % stride;
  const int vectors = round_up((s.width + skip + stride - 1) / stride, kLanes) / kLanes;
  float* line = w.out + pitch * kTileRows * stride * stride;
  for (int a = start; stride * a < s.height + pad; a += kTileRows) {
    for (int phase = 0; phase < stride * stride; phase++) {
      // Taps 2 m + phase <= K - 1 of the kernel; in the rotated one they start `skip` in, at dy row and column 1 - phase.
      const int py = phase / stride, px = phase % stride;
      const int ny = (k - py + stride - 1) / stride, nx = (k - px + stride - 1) / stride;
      const Taps taps = {w.flipped + (k - 1 - py - stride * (ny - 1)) * k + (k - 1 - px - stride * (nx - 1)), ny, nx,
                         stride * k, stride};
      select_tile(ny, nx, 1)(w.dy, a + reach + 1 - ny, start + reach + 1 - nx, taps, 0.f, vectors,
                             w.out + phase * kTileRows * pitch, pitch);
    }
    for (int r = 0; r < kTileRows * stride; r++) {
      const int y = stride * a + r - pad;
      if (y < 0 || y >= s.height) continue;
      const float* row = w.out + (r % stride * stride * kTileRows + r / stride) * pitch;
      if (stride == 1) {
        write_row(row, s.width, dx + (std::ptrdiff_t)y * s.width);
        continue;
      }
      const float* odd = row + kTileRows * pitch;
      for (int i = 0; i < vectors * kLanes; i++) {
        line[2 * i] = row[i];
        line[2 * i + 1] = odd[i];
      }
      write_row(line + skip, s.width, dx + (std::ptrdiff_t)y * s.width);
    }
  }
}

// KY rows of the weight gradient from bordered kernel row ky on, in registers over the whole plane.
template <int KY, int KX, int S>
void weight_gradient_tile(const Bordered& x, const Bordered& dy, int border, int ky, int height, int vectors, float* out) {
  Vec sum[KY * KX];
#pragma GCC unroll 32
  for (int i = 0; i < KY * KX; i++) sum[i] = Vec{};
  const float* columns[KX];
  for (int i = 0; i < KX; i++) columns[i] = x.at(ky, i);
  for (int row = 0; row < height; row++) {
    const float* from = dy.at(row + border, border);
    for (int v = 0; v < vectors; v++) {
      const Vec value = load(from + v * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < KY * KX; i++) {
        sum[i] += value * load(columns[i % KX] + (S * row + i / KX) * x.pitch + v * kLanes);
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < KY * KX; i++) {
    float total = 0;
    for (int lane = 0; lane < kLanes; lane++) total += sum[i][lane];
    out[ky * KX + i] += total;
  }
}

template <int K, int S>
void weight_gradient_fixed(const Bordered& x, const Bordered& dy, int border, int height, int vectors, float* out) {
  constexpr int rows = std::min(K, (kRegisters == 32 ? 25 : 12) / K);
  int ky = 0;
  for (; ky + rows <= K; ky += rows) weight_gradient_tile<rows, K, S>(x, dy, border, ky, height, vectors, out);
  if constexpr (K % rows != 0) weight_gradient_tile<K % rows, K, S>(x, dy, border, ky, height, vectors, out);
}

inline void weight_gradient_any(const Bordered& x, const Bordered& dy, int border, int k, int height, int vectors,
                                float* out) {
  for (int i = 0; i < k * k; i++) {
    Vec sum = {};
    for (int row = 0; row < height; row++) {
      const float* from = dy.at(row + border, border);
      const float* other = x.at(x.stride * row + i / k, i % k);
      for (int v = 0; v < vectors; v++) sum += load(from + v * kLanes) * load(other + v * kLanes);
    }
    for (int lane = 0; lane < kLanes; lane++) out[i] += sum[lane];
  }
}

// Adds one plane's weight gradient to w.sum. The columns behind the last output meet a zero of dy's border.
template <class T>
void weight_gradient_plane(const T* x, const T* dy, const Shape& s, Workspace& w) {
  const int k = s.kernel, area = k * k, border = (k - 1) / s.stride, height = s.out_height();
  const int vectors = round_up(s.out_width(), kLanes) / kLanes;
  Scratch part(area);
  std::fill(part.floats(), part.floats() + area, 0.f);
  copy_plane(x, s.height, s.width, k / 2, w.x, w.out);
  switch (k > 5 ? 0 : k * 10 + s.stride) {
    case 31: weight_gradient_fixed<3, 1>(w.x, w.dy, border, height, vectors, part.floats()); break;
    case 32: weight_gradient_fixed<3, 2>(w.x, w.dy, border, height, vectors, part.floats()); break;
    case 51: weight_gradient_fixed<5, 1>(w.x, w.dy, border, height, vectors, part.floats()); break;
    case 52: weight_gradient_fixed<5, 2>(w.x, w.dy, border, height, vectors, part.floats()); break;
    default: weight_gradient_any(w.x, w.dy, border, k, height, vectors, part.floats());
  }
  if (!all_finite(part.floats(), area)) {
    std::fill(part.floats(), part.floats() + area, 0.f);
    for_each_tap(s, [&](auto o, auto i, int tap) { part.floats()[tap] += to_float(dy + o) * to_float(x + i); });
  }
  for (int i = 0; i < area; i++) w.sum[i] += part.floats()[i];
}

// ---- whole tensors ----

template <class T>
void forward_small(const T* x, const T* weight, const T* bias, const Shape& s, T* y) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const int area = s.kernel * s.kernel;
#pragma omp parallel
  {
    Workspace w(s);
#pragma omp for schedule(static)
    for (std::ptrdiff_t plane = 0; plane < (std::ptrdiff_t)s.batch * s.channels; plane++) {
      const int channel = plane % s.channels;
      copy_row(weight + (std::ptrdiff_t)channel * area, area, w.weight);
      forward_plane(x + plane * in, bias ? to_float(bias + channel) : 0.f, s, w, y + plane * out);
    }
  }
}

// dx, dweight and dbias may be null. One thread sums a channel over the batch, in its order.
template <class T>
void backward_small(const T* x, const T* weight, const T* dy, const Shape& s, T* dx, T* dweight, T* dbias) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const int area = s.kernel * s.kernel, border = (s.kernel - 1) / s.stride;
#pragma omp parallel
  {
    Workspace w(s);
#pragma omp for schedule(static)
    for (int channel = 0; channel < s.channels; channel++) {
      copy_row(weight + (std::ptrdiff_t)channel * area, area, w.weight);
      std::fill(w.sum, w.sum + area, 0.f);
      float total = 0;
      for (int image = 0; image < s.batch; image++) {
        const std::ptrdiff_t plane = (std::ptrdiff_t)image * s.channels + channel;
        copy_plane(dy + plane * out, s.out_height(), s.out_width(), border, w.dy, nullptr);
        if (dx) input_gradient_plane(dy + plane * out, s, w, dx + plane * in);
        if (dweight) weight_gradient_plane(x + plane * in, dy + plane * out, s, w);
        if (dbias) {
          for (int row = 0; row < s.out_height(); row++) {
            Vec sum = {};
            for (int i = 0; i < s.out_width(); i += kLanes) sum += load(w.dy.at(row + border, border + i));
            for (int lane = 0; lane < kLanes; lane++) total += sum[lane];
          }
        }
      }
      if (dweight) write_row(w.sum, area, dweight + (std::ptrdiff_t)channel * area);
      if (dbias) write_row(&total, 1, dbias + channel);
    }
  }
}

}  // namespace dwconv
