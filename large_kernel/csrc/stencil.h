// 3x3 kernels, stride 1 and 2, on planes: pixels of a row in vector lanes, down the rows of a strip one vector wide. Planes
// are read and written where they lie: a copy with a border or a transposition takes longer than the products.
#pragma once
#include "rows.h"

namespace dwconv {

// Measured: maps from this width on. On narrower ones transposing wins, which fills vectors whatever the width.
constexpr int kStencilFrom = kLanes == 16 ? 12 : kLanes == 8 ? 32 : 1 << 30;

inline bool is_stencil(const Shape& s) { return s.kernel == 3 && s.width >= kStencilFrom; }

// Rows asked for before they are needed: the processor does not guess them.
constexpr int kAhead = 8;

template <class T>
struct Plane {
  T* data;
  int height, width;

  T* row(int y) const { return data + (std::ptrdiff_t)y * width; }
};

// Column x and those behind it. With Inside all are on the map; else there are zeros behind its right edge.
template <bool Inside, class T>
DW_INLINE Vec read_strip(const Plane<const T>& plane, int y, int x) {
  return Inside ? load(plane.row(y) + x) : load_first(plane.row(y) + x, plane.width - x);
}

template <bool Inside, class T>
DW_INLINE void write_strip(const Plane<T>& plane, int y, int x, Vec v) {
  Inside ? store(plane.row(y) + x, v) : store_first(plane.row(y) + x, v, plane.width - x);
}

// What the taps of one row of the kernel meet in row y of the input, for output columns x and on.
template <int S, bool Inside, class T>
struct Taps3 {
  Vec left, middle, right;

  DW_INLINE Taps3(const Plane<const T>& plane, int y, int x) {
    const T* ahead = plane.row(y + kAhead) + S * x;
    __builtin_prefetch(ahead);
    if (S == 1) {
      middle = read_strip<Inside>(plane, y, x);
      left = x == 0 ? move_up(Vec{}, middle) : read_strip<Inside>(plane, y, x - 1);
      right = read_strip<Inside>(plane, y, x + 1);
    } else {
      __builtin_prefetch(ahead + kLanes);
      deinterleave(read_strip<Inside>(plane, y, 2 * x), read_strip<Inside>(plane, y, 2 * x + kLanes), &middle, &right);
      left = move_up(x == 0 ? Vec{} : load(plane.row(y) + 2 * x - kLanes), right);
    }
  }
  DW_INLINE Vec times(const Vec* weight) const { return left * weight[0] + middle * weight[1] + right * weight[2]; }
  DW_INLINE void add_to(Vec* sums, Vec value) const {
    sums[0] += left * value;
    sums[1] += middle * value;
    sums[2] += right * value;
  }
};

// Calls f(begin, end, first column, whether all is inside) for rows [begin, end) of the strips of outputs of an input.
// Strips of wide maps have few rows, so that a plane is passed from front to back.
template <int S, class F>
DW_INLINE void for_each_strip(int height, int width, int few, F f) {
  const int rows = (height - 1) / S + 1, step = width > 2 * kLanes ? few : rows;
  for (int begin = 0; begin < rows; begin += step) {
    const int end = std::min(begin + step, rows);
    int x = 0;
    for (; S * (x + kLanes) + (S == 1) <= width; x += kLanes) f(begin, end, x, std::true_type{});
    for (; S * x < width; x += kLanes) f(begin, end, x, std::false_type{});
  }
}

// out = finish(the correlation of x with nine weights).
template <int S, class T, class F>
void stencil(const Plane<const T>& x, const Vec* weight, const Plane<T>& out, F finish) {
  for_each_strip<S>(x.height, x.width, 2 * S, [&](int begin, int end, int column, auto is_inside) {
    constexpr bool inside = is_inside();
    using Row = Taps3<S, inside, T>;
    Vec above = {}, sum = {};  // what the row above contributes, and what is known of the next output
    if constexpr (S == 1) {
      for (int y = std::max(begin - 1, 0); y < std::min(end + 1, x.height); y++) {
        const Row row(x, y, column);
        if (y > begin) write_strip<inside>(out, y - 1, column, finish(sum + row.times(weight + 6)));
        sum = above + row.times(weight + 3);
        above = row.times(weight);
      }
      if (end == x.height) write_strip<inside>(out, end - 1, column, finish(sum));
    } else {
      if (begin > 0) above = Row(x, 2 * begin - 1, column).times(weight);
      for (int y = begin; y < end; y++) {
        sum = above + Row(x, 2 * y, column).times(weight + 3);
        if (2 * y + 1 < x.height) {
          const Row row(x, 2 * y + 1, column);
          sum += row.times(weight + 6);
          above = row.times(weight);
        }
        write_strip<inside>(out, y, column, finish(sum));
      }
    }
  });
}

// The input's gradient at stride 2: a pixel of an even row or column met the middle tap alone, one of an odd row or column
// the last tap of one output and the first of the next.
template <class T>
void spread(const Plane<const T>& dy, const Vec* w, const Plane<T>& dx) {
  for_each_strip<1>(dy.height, dy.width, 4, [&](int begin, int end, int column, auto is_inside) {
    constexpr bool inside = is_inside();
    auto put = [&](int y, Vec even, Vec odd) {
      Vec both[2];
      interleave(even, odd, both);
      write_strip<inside>(dx, y, 2 * column, both[0]);
      write_strip<inside>(dx, y, 2 * column + kLanes, both[1]);
    };
    Vec p = read_strip<inside>(dy, begin, column), p1 = read_strip<inside>(dy, begin, column + 1);
    for (int y = begin; y < end; y++) {
      __builtin_prefetch(dy.row(y + kAhead) + column);
      Vec q = {}, q1 = {};
      if (y + 1 < dy.height) q = read_strip<inside>(dy, y + 1, column), q1 = read_strip<inside>(dy, y + 1, column + 1);
      put(2 * y, p * w[4], p * w[5] + p1 * w[3]);
      if (2 * y + 1 < dx.height) put(2 * y + 1, p * w[7] + q * w[1], p * w[8] + p1 * w[6] + (q * w[2] + q1 * w[0]));
      p = q, p1 = q1;
    }
  });
}

// Adds the products of dy with the input to the gradients of the nine weights.
template <int S, class T>
void add_products(const Plane<const T>& x, const Plane<const T>& dy, Vec* sums) {
  for_each_strip<S>(x.height, x.width, 2 * S, [&](int begin, int end, int column, auto is_inside) {
    constexpr bool inside = is_inside();
    using Row = Taps3<S, inside, T>;
    Vec sum[9];
    std::copy_n(sums, 9, sum);
    auto gradient = [&](int y) { return y >= 0 && y < dy.height ? read_strip<inside>(dy, y, column) : Vec{}; };
    Vec before = gradient(begin - 1), value = gradient(begin);
    for (int y = begin; y < end; y++) {
      const Vec next = gradient(y + 1);
      const Row row(x, S * y, column);
      row.add_to(sum + 3, value);
      if constexpr (S == 1) {
        row.add_to(sum, next);
        row.add_to(sum + 6, before);
      } else if (2 * y + 1 < x.height) {
        const Row odd(x, 2 * y + 1, column);
        odd.add_to(sum, next);
        odd.add_to(sum + 6, value);
      }
      before = value, value = next;
    }
    std::copy_n(sum, 9, sums);
  });
}

// The nine weights, each in all lanes. Whether all are finite; if not, zeros beyond the border must not meet them.
template <class T>
bool splat_weights(const T* weight, Vec* to) {
  Finite finite;
  for (int i = 0; i < 9; i++) {
    to[i] = splat(to_float(weight + i));
    finite.see(to[i]);
  }
  return finite.all();
}

template <int S, class T>
void forward_stencil(const T* x, const T* weight, const Epilogue& epilogue, const Shape& s, T* y) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
#pragma omp parallel for schedule(static)
  for (std::ptrdiff_t plane = 0; plane < (std::ptrdiff_t)s.batch * s.channels; plane++) {
    const int channel = plane % s.channels;
    const T* w = weight + (std::ptrdiff_t)channel * 9;
    Vec taps[9];
    if (!splat_weights(w, taps)) {
      exact_forward(x + plane * in, w, epilogue, channel, s, y + plane * out);
      continue;
    }
    epilogue.with_channel(channel, [&](auto finish) {
      stencil<S>(Plane<const T>{x + plane * in, s.height, s.width}, taps,
                 Plane<T>{y + plane * out, s.out_height(), s.out_width()}, finish);
    });
  }
}

// dx, dweight and dbias may be null. One thread sums a channel over the batch, in its order.
template <int S, class T>
void backward_stencil(const T* x, const T* weight, const T* dy, const Shape& s, T* dx, T* dweight, T* dbias) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
#pragma omp parallel for schedule(static)
  for (int channel = 0; channel < s.channels; channel++) {
    const T* w = weight + (std::ptrdiff_t)channel * 9;
    Vec taps[9], rotated[9], sums[9] = {}, bias = {};  // of whole planes, so that small terms do not drown in large sums
    const bool finite = splat_weights(w, taps);
    std::reverse_copy(taps, taps + 9, rotated);
    for (int image = 0; image < s.batch; image++) {
      const std::ptrdiff_t index = (std::ptrdiff_t)image * s.channels + channel;
      const Plane<const T> plane = {x + index * in, s.height, s.width};
      const Plane<const T> gradient = {dy + index * out, s.out_height(), s.out_width()};
      const Plane<T> to = {dx ? dx + index * in : nullptr, s.height, s.width};
      if (dx && !finite) {
        exact_input_gradient(gradient.data, w, s, to.data);
      } else if (dx && S == 1) {
        stencil<1>(gradient, rotated, to, Identity{});
      } else if (dx) {
        spread(gradient, taps, to);
      }
      if (dweight) {
        Vec products[9] = {};
        add_products<S>(plane, gradient, products);
        for (int i = 0; i < 9; i++) sums[i] += products[i];
      }
      if (dbias) {
        Vec sum = {};
        for (std::ptrdiff_t i = 0; i < out; i += kLanes) sum += load_first(gradient.data + i, out - i);
        bias += sum;
      }
    }
    if (dweight) {
      float sum[9 + kLanes] = {};  // whole vectors are read
      for (int i = 0; i < 9; i++) sum[i] = sum_lanes(sums[i]);
      T* to = dweight + (std::ptrdiff_t)channel * 9;
      if (all_finite(sum, 9)) {
        write_row(sum, 9, to, to + 9);
      } else {
        exact_weight_gradient(x + channel * in, dy + channel * out, s, to);
      }
    }
    if (dbias) store_part(dbias + channel, splat(sum_lanes(bias)), 1);
  }
}

}  // namespace dwconv
