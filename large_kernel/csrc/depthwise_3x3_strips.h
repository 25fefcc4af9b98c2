// The inner loops of 3x3 kernels in NCHW: strips one vector wide, processed row by row. The contributions of an input
// row to the outputs above and below it stay in registers.
//
//   |<- kLanes ->|            input row y, shifted left, middle, right: contributes to
//   |  strip 0   | strip 1    output row y - 1   += row y * kernel row 2, then written
//   |     |      |            output row y       += row y * kernel row 1
//   |     v      |            output row y + 1    = row y * kernel row 0
#pragma once
#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace large_kernel {

// Pixels (3.5 KB) to prefetch ahead, which the hardware prefetcher does not do here.
constexpr int kPrefetchAhead = 896;

template <class T>
struct Plane {
  T* data;
  int height, width;

  T* row(int y) const { return data + (std::ptrdiff_t)y * width; }
};

// The lanes of a strip that are on the map: all of them with Inside, otherwise the first n.
template <bool Inside>
struct StripLanes {
  LaneMask first;

  LK_INLINE explicit StripLanes(std::ptrdiff_t n) : first(n) {}
  LK_INLINE Vec read(const float* p) const { return Inside ? load(p) : first.read(p); }
  LK_INLINE void write(float* p, Vec v) const { Inside ? store(p, v) : first.write(p, v); }
};

// Nine weights, each in all lanes.
LK_INLINE void splat9(const float* weight, Vec* to) {
#pragma GCC unroll 9
  for (int i = 0; i < 9; i++) to[i] = splat(weight[i]);
}

// The pixels of one input row that the three taps of a kernel row meet.
struct Window3 {
  Vec left, middle, right;

  LK_INLINE Vec times(const Vec* weight) const { return left * weight[0] + middle * weight[1] + right * weight[2]; }
  LK_INLINE void add_to(Vec* sums, Vec value) const {
    sums[0] += left * value;
    sums[1] += middle * value;
    sums[2] += right * value;
  }
};

// Reads these windows row by row, for the output columns from x on.
template <int S, bool Inside>
struct WindowReader {
  const float* at;
  std::ptrdiff_t pitch;
  bool first;
  StripLanes<Inside> before, from, after;

  LK_INLINE WindowReader(const Plane<const float>& plane, int y, int x)
      : at(plane.row(y) + S * x),
        pitch(plane.width),
        first(x == 0),
        before(plane.width - x + 1),
        from(plane.width - S * x),
        after(plane.width - S * x - (S == 1 ? 1 : kLanes)) {}

  LK_INLINE Window3 next() {
    const float *here = at, *ahead = at + kPrefetchAhead;
    at += pitch;
    __builtin_prefetch(ahead);
    if constexpr (S == 1) {
      const Vec middle = from.read(here);
      return {first ? shift_lanes_up(Vec{}, middle) : before.read(here - 1), middle, after.read(here + 1)};
    } else {
      __builtin_prefetch(ahead + kLanes);
      Vec even, odd;
      deinterleave(from.read(here), after.read(here + kLanes), &even, &odd);
      return {shift_lanes_up(first ? Vec{} : load(here - kLanes), odd), even, odd};
    }
  }
};

// Calls f(begin, end, first column, last column, whether all lanes are inside) for rows [begin, end) of the strips of
// outputs. On wide maps strips have few rows, so that a plane is traversed from front to back.
template <int S, class F>
LK_INLINE void for_each_column_strip(int height, int width, int few, F f) {
  const int rows = (height - 1) / S + 1, step = width > 2 * kLanes ? few : rows;
  const int inside = std::max(0, width - (S == 1)) / (S * kLanes) * kLanes;
  for (int begin = 0; begin < rows; begin += step) {
    const int end = std::min(begin + step, rows);
    if (inside > 0) f(begin, end, 0, inside, std::true_type{});
    if (S * inside < width) f(begin, end, inside, (width - 1) / S + 1, std::false_type{});
  }
}

// out = finish(correlation of x with nine weights), for rows [begin, end) of the strips from column `first` to `last`.
// Separate functions, so that the variables of their loops fit in registers.
template <int S, bool Inside, class F>
__attribute__((noinline)) void correlate_strips(const Plane<const float>& x, const float* weight,
                                                const Plane<float>& out, int begin, int end, int first, int last,
                                                F finish) {
  const std::ptrdiff_t pitch = out.width;
  const int pairs = std::min(end, x.height / 2), reach = std::min(end + 1, x.height);
  Vec w[9];
  splat9(weight, w);
  for (int column = first; column < last; column += kLanes) {
    const StripLanes<Inside> strip(out.width - column);
    WindowReader<S, Inside> taps(x, begin > 0 ? S * begin - 1 : 0, column);
    float* to = out.row(begin) + column;
    auto put = [&](Vec v) {
      strip.write(to, finish(v));
      to += pitch;
    };
    Vec above = begin > 0 ? taps.next().times(w) : Vec{};  // what the row above contributes to the next output
    if constexpr (S == 1) {
      Window3 row = taps.next();
      Vec sum = above + row.times(w + 3);
      above = row.times(w);
      for (int y = begin + 1; y < reach; y++) {
        row = taps.next();
        put(sum + row.times(w + 6));
        sum = above + row.times(w + 3);
        above = row.times(w);
      }
      if (end == x.height) put(sum);
    } else {
      for (int y = begin; y < pairs; y++) {
        const Vec sum = above + taps.next().times(w + 3);
        const Window3 odd = taps.next();
        above = odd.times(w);
        put(sum + odd.times(w + 6));
      }
      if (pairs < end) put(above + taps.next().times(w + 3));
    }
  }
}

// The input gradient at stride 2. A pixel in an even row (or column) has met only the middle tap, one in an odd row the
// last tap of one output and the first tap of the next. `to_prefetch` is prefetched: what is read next, or written here.
template <bool Inside>
__attribute__((noinline)) void input_gradient_strips(const Plane<const float>& dy, const float* weight,
                                                     const Plane<float>& dx, int begin, int end, int first, int last,
                                                     const float* to_prefetch) {
  const std::ptrdiff_t pitch = dy.width, to_pitch = dx.width;
  const int full = std::min(end, dy.height - 1);
  Vec w[9];
  splat9(weight, w);
  for (int column = first; column < last; column += kLanes) {
    const StripLanes<Inside> here(dy.width - column), right(dy.width - column - 1);
    const StripLanes<Inside> low(dx.width - 2 * column), high(dx.width - 2 * column - kLanes);
    const float* from = dy.row(begin) + column;
    float* to = dx.row(2 * begin) + 2 * column;
    const float* fetch = to_prefetch + 2 * begin * to_pitch + 2 * column;
    auto put = [&](Vec even, Vec odd) {
      __builtin_prefetch(fetch);
      __builtin_prefetch(fetch + kLanes);
      fetch += to_pitch;
      Vec both[2];
      interleave(even, odd, both);
      low.write(to, both[0]);
      high.write(to + kLanes, both[1]);
      to += to_pitch;
    };
    Vec p = here.read(from), p1 = right.read(from + 1);
    for (int y = begin; y < full; y++) {
      from += pitch;
      __builtin_prefetch(from + kPrefetchAhead);
      const Vec q = here.read(from), q1 = right.read(from + 1);
      put(p * w[4], p * w[5] + p1 * w[3]);
      put(p * w[7] + q * w[1], p * w[8] + p1 * w[6] + (q * w[2] + q1 * w[0]));
      p = q, p1 = q1;
    }
    if (full < end) {
      put(p * w[4], p * w[5] + p1 * w[3]);
      if (dx.height % 2 == 0) put(p * w[7], p * w[8] + p1 * w[6]);
    }
  }
}

// Adds the products of dy and the input to the gradients of the nine weights.
template <int S, bool Inside>
__attribute__((noinline)) void weight_gradient_strips(const Plane<const float>& x, const Plane<const float>& dy,
                                                      Vec* sums, int begin, int end, int first, int last) {
  const std::ptrdiff_t pitch = dy.width;
  Vec sum[9] = {};
  for (int column = first; column < last; column += kLanes) {
    WindowReader<S, Inside> taps(x, S * begin, column);
    const StripLanes<Inside> strip(dy.width - column);
    const float* from = dy.row(begin) + column;
    Vec before = begin > 0 ? strip.read(from - pitch) : Vec{}, value = strip.read(from);
    for (int y = begin; y < end; y++) {
      from += pitch;
      const Vec next = y + 1 < dy.height ? strip.read(from) : Vec{};
      const Window3 row = taps.next();
      row.add_to(sum + 3, value);
      if constexpr (S == 1) {
        row.add_to(sum, next);
        row.add_to(sum + 6, before);
      } else if (2 * y + 1 < x.height) {
        const Window3 odd = taps.next();
        odd.add_to(sum, next);
        odd.add_to(sum + 6, value);
      }
      before = value, value = next;
    }
  }
#pragma GCC unroll 9
  for (int i = 0; i < 9; i++) sums[i] += sum[i];
}

}  // namespace large_kernel
