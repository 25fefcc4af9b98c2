// 3x3 kernels, stride 1 and 2, on planes: pixels of a row in vector lanes, down the rows of a strip one vector wide. Planes
// are read and written where they lie: a copy with a border or a transposition takes longer than the products.
#pragma once
#include "depthwise_generic.h"

namespace large_kernel {

// Measured: maps from this width on. On narrower ones transposing wins, which fills vectors whatever the width.
constexpr int kMin3x3Width = kLanes == 16 ? 10 : kLanes == 8 ? 32 : 1 << 30;

inline bool uses_3x3(const Shape& s) { return s.kernel == 3 && s.width >= kMin3x3Width; }

constexpr int kBandRows = 4;  // rows of outputs, in wide maps

// Pixels prefetched before they are needed, 3.5 KB: the processor does not foresee them.
constexpr int kPrefetchAhead = 896;

template <class T>
struct Plane {
  T* data;
  int height, width;

  T* row(int y) const { return data + (std::ptrdiff_t)y * width; }
};

// The lanes of a strip that are on the map: with Inside all of them, else the first n.
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

// What the taps of one row of the kernel meet in a row of the input.
struct Window3 {
  Vec left, middle, right;

  LK_INLINE Vec times(const Vec* weight) const { return left * weight[0] + middle * weight[1] + right * weight[2]; }
  LK_INLINE void add_to(Vec* sums, Vec value) const {
    sums[0] += left * value;
    sums[1] += middle * value;
    sums[2] += right * value;
  }
};

// Reads them row after row, for output columns x and on.
template <int S, bool Inside>
struct WindowReader {
  const float* at;
  std::ptrdiff_t pitch;
  bool first;
  StripLanes<Inside> before, from, behind;

  LK_INLINE WindowReader(const Plane<const float>& plane, int y, int x)
      : at(plane.row(y) + S * x), pitch(plane.width), first(x == 0), before(plane.width - x + 1),
        from(plane.width - S * x), behind(plane.width - S * x - (S == 1 ? 1 : kLanes)) {}

  LK_INLINE Window3 next() {
    const float *here = at, *ahead = at + kPrefetchAhead;
    at += pitch;
    __builtin_prefetch(ahead);
    if constexpr (S == 1) {
      const Vec middle = from.read(here);
      return {first ? shift_lanes_up(Vec{}, middle) : before.read(here - 1), middle, behind.read(here + 1)};
    } else {
      __builtin_prefetch(ahead + kLanes);
      Vec even, odd;
      deinterleave(from.read(here), behind.read(here + kLanes), &even, &odd);
      return {shift_lanes_up(first ? Vec{} : load(here - kLanes), odd), even, odd};
    }
  }
};

// Calls f(begin, end, first column, last column, whether all is inside) for rows [begin, end) of the strips of outputs of an
// input. Strips of wide maps have few rows, so that a plane is passed from front to back.
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

// out = finish(the correlation of x with nine weights), rows [begin, end) of the strips from column `first` to `last`. These
// are functions of their own, so that what their loops need finds registers.
template <int S, bool Inside, class F>
__attribute__((noinline)) void correlate_strips(const Plane<const float>& x, const float* weight, const Plane<float>& out,
                                              int begin, int end, int first, int last, F finish) {
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

// The input's gradient at stride 2: a pixel of an even row or column met the middle tap alone, one of an odd row or column
// the last tap of one output and the first of the next. `soon` is prefetched: what is read next, or is written here.
template <bool Inside>
__attribute__((noinline)) void input_gradient_strips(const Plane<const float>& dy, const float* weight, const Plane<float>& dx,
                                             int begin, int end, int first, int last, const float* soon) {
  const std::ptrdiff_t pitch = dy.width, to_pitch = dx.width;
  const int full = std::min(end, dy.height - 1);
  Vec w[9];
  splat9(weight, w);
  for (int column = first; column < last; column += kLanes) {
    const StripLanes<Inside> here(dy.width - column), right(dy.width - column - 1);
    const StripLanes<Inside> low(dx.width - 2 * column), high(dx.width - 2 * column - kLanes);
    const float* from = dy.row(begin) + column;
    float* to = dx.row(2 * begin) + 2 * column;
    const float* fetch = soon + 2 * begin * to_pitch + 2 * column;
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

// Adds the products of dy with the input to the gradients of the nine weights.
template <int S, bool Inside>
__attribute__((noinline)) void weight_gradient_strips(const Plane<const float>& x, const Plane<const float>& dy, Vec* sums,
                                                   int begin, int end, int first, int last) {
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

// ---- stride 2, two rows of outputs in a vector ----

// On maps this narrow, with 16 lanes: row o of the output in the first half of a vector, row o + 1 in the second.
#if defined(__AVX512F__)
inline bool packs_row_pairs(int out_width) { return out_width <= kLanes / 2; }

// The columns of two rows of the input that the middle and the right tap of a row of the kernel meet. The left tap meets `odd`
// one output further on.
struct ParityColumns {
  Vec even, odd;

  // rows a and b, zeros behind their ends
  LK_INLINE ParityColumns(Vec a, Vec b)
      : even(LK_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)),
        odd(LK_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)) {}
  // the second row of a and the first of b
  LK_INLINE ParityColumns(const ParityColumns& a, const ParityColumns& b) : even(second_first(a.even, b.even)), odd(second_first(a.odd, b.odd)) {}

  static LK_INLINE Vec second_first(Vec a, Vec b) {
    return LK_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
  }
  LK_INLINE Vec times(const Vec* weight) const { return even * weight[1] + odd * weight[2]; }
};

// Calls f(first output row of two, what the kernel's three rows meet).
template <class F>
LK_INLINE void for_each_row_pair(const Plane<const float>& x, int rows, F f) {
  const LaneMask first(x.width);
  const float* at = x.data;
  int y = 0;
  auto next = [&] {
    if (y++ >= x.height) return Vec{};
    const Vec row = first.read(at);
    at += x.width;
    return row;
  };
  ParityColumns before(Vec{}, Vec{});
  for (int o = 0; o < rows; o += 2) {
    __builtin_prefetch(at + kPrefetchAhead);
    __builtin_prefetch(at + kPrefetchAhead + 2 * x.width);
    const Vec a = next(), b = next(), c = next(), d = next();
    const ParityColumns bottom(b, d);
    f(o, ParityColumns(before, bottom), ParityColumns(a, c), bottom);
    before = bottom;
  }
}

template <class F>
__attribute__((noinline)) void correlate_row_pairs(const Plane<const float>& x, const float* weight, const Plane<float>& out,
                                             F finish) {
  VecI32 together;  // the lanes of both rows, one behind the other; of each number its last four bits count
  for (int i = 0; i < kLanes; i++) together[i] = i < out.width ? i : i - out.width + kLanes / 2;
  Vec w[9];
  splat9(weight, w);
  const LaneMask both(2 * out.width), one(out.width);
  for_each_row_pair(x, out.height, [&](int o, const ParityColumns& top, const ParityColumns& middle, const ParityColumns& bottom) {
    const Vec left = top.odd * w[0] + middle.odd * w[3] + bottom.odd * w[6];
    Vec sum = LK_SHUFFLE(left, Vec{}, 16, 0, 1, 2, 3, 4, 5, 6, 16, 8, 9, 10, 11, 12, 13, 14);
    sum += top.times(w) + middle.times(w + 3) + bottom.times(w + 6);
    // with a mask, since GCC 12 warns of its own header without
    const Vec rows = (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)together, (__m512)finish(sum));
    (o + 1 < out.height ? both : one).write(out.row(o), rows);
  });
}

inline __attribute__((noinline)) void weight_gradient_row_pairs(const Plane<const float>& x, const Plane<const float>& dy, Vec* sums) {
  const LaneMask first(dy.width);
  Vec sum[9] = {};
  for_each_row_pair(x, dy.height, [&](int o, const ParityColumns& top, const ParityColumns& middle, const ParityColumns& bottom) {
    const Vec a = first.read(dy.row(o)), b = o + 1 < dy.height ? first.read(dy.row(o + 1)) : Vec{};
    const Vec value = LK_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Vec next = LK_SHUFFLE(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 17, 18, 19, 20, 21, 22, 23, 24);
    auto add = [&](Vec* sum, const ParityColumns& row) {
      sum[0] += row.odd * next;
      sum[1] += row.even * value;
      sum[2] += row.odd * value;
    };
    add(sum, top);
    add(sum + 3, middle);
    add(sum + 6, bottom);
  });
#pragma GCC unroll 9
  for (int i = 0; i < 9; i++) sums[i] += sum[i];
}

// Rows of the input's gradient fit into a vector: each output's gradient in the lanes of the two columns it meets, and the one
// to the right of it in the second of them.
inline __attribute__((noinline)) void input_gradient_row_pairs(const Plane<const float>& dy, const float* weight, const Plane<float>& dx) {
  auto both = [&](int even, int odd) {
    return LK_SHUFFLE(splat(weight[even]), splat(weight[odd]), 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16);
  };
  const Vec even = both(4, 5), even_right = splat(weight[3]), odd = both(7, 8), odd_right = splat(weight[6]);
  const Vec next = both(1, 2), next_right = splat(weight[0]);
  const LaneMask from(dy.width), to(dx.width);
  struct Row {
    Vec here, right;
    LK_INLINE explicit Row(Vec v)
        : here(LK_SHUFFLE(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)),
          right(LK_SHUFFLE(v, Vec{}, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16, 8)) {}
  };
  Row p(from.read(dy.data));
  for (int y = 0; y < dy.height; y++) {
    const Row q(y + 1 < dy.height ? from.read(dy.row(y + 1)) : Vec{});
    to.write(dx.row(2 * y), p.here * even + p.right * even_right);
    if (2 * y + 1 < dx.height) {
      to.write(dx.row(2 * y + 1), p.here * odd + p.right * odd_right + (q.here * next + q.right * next_right));
    }
    p = q;
  }
}
#endif

// ---- whole planes ----

template <int S, class F>
void correlate_3x3(const Plane<const float>& x, const float* weight, const Plane<float>& out, F finish) {
#if defined(__AVX512F__)
  if (S == 2 && packs_row_pairs(out.width)) return correlate_row_pairs(x, weight, out, finish);
#endif
  for_each_column_strip<S>(x.height, x.width, 2 * S, [&](int begin, int end, int first, int last, auto is_inside) {
    correlate_strips<S, is_inside()>(x, weight, out, begin, end, first, last, finish);
  });
}

// Whether gradients [N, C, H, W] of these planes are written past the caches, which could not keep them but would first read
// what is written over; of the network's layers those at 224 pixels with a batch of 4 or more.
inline bool streams_past_caches([[maybe_unused]] const Shape& s, [[maybe_unused]] const void* dx) {
#if defined(__AVX512F__)
  constexpr std::ptrdiff_t least = 2 << 20;  // pixels
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  return plane * s.channels * s.batch >= least && plane % kLanes == 0 && s.width % 2 == 0 && (std::uintptr_t)dx % 64 == 0;
#else
  return false;
#endif
}

// Rows of dx that are written together.
inline int band_rows(const Shape& s) { return s.out_width() > 2 * kLanes ? 2 * kBandRows : s.height; }

// With `band`, memory for band_rows(), dx is written past the caches, and `soon` not prefetched: that would delay both.
inline void input_gradient_stride2(const Plane<const float>& dy, const float* weight, const Plane<float>& dx, [[maybe_unused]] float* band,
                   const float* soon) {
#if defined(__AVX512F__)
  if (packs_row_pairs(dy.width)) return input_gradient_row_pairs(dy, weight, dx);
#endif
  for_each_column_strip<1>(dy.height, dy.width, kBandRows, [&](int begin, int end, int first, int last, auto is_inside) {
#if defined(__AVX512F__)
    if (band) {
      const std::ptrdiff_t before = (std::ptrdiff_t)2 * begin * dx.width;
      input_gradient_strips<is_inside()>(dy, weight, {band - before, dx.height, dx.width}, begin, end, first, last, band - before);
      const std::ptrdiff_t pixels = (std::ptrdiff_t)std::min(2 * end, dx.height) * dx.width - before;
      for (std::ptrdiff_t i = 0; last == dy.width && i < pixels; i += kLanes) {
        _mm512_stream_ps(dx.data + before + i, (__m512)load(band + i));
      }
      return;
    }
#endif
    input_gradient_strips<is_inside()>(dy, weight, dx, begin, end, first, last, soon);
  });
}

template <int S>
void weight_gradient_3x3(const Plane<const float>& x, const Plane<const float>& dy, Vec* sums) {
#if defined(__AVX512F__)
  if (S == 2 && packs_row_pairs(dy.width)) return weight_gradient_row_pairs(x, dy, sums);
#endif
  for_each_column_strip<S>(x.height, x.width, 2 * S, [&](int begin, int end, int first, int last, auto is_inside) {
    weight_gradient_strips<S, is_inside()>(x, dy, sums, begin, end, first, last);
  });
}

// Copies nine weights. Whether all are finite; if not, zeros beyond the border must not meet them.
inline bool load_weights_3x3(const float* weight, float* to) {
  FiniteCheck finite;
  for (int i = 0; i < 9; i += kLanes) {
    const Vec v = load_clamped(weight + i, 9 - i);
    finite.see(v);
    store(to + i, v);
  }
  return finite.all();
}

template <int S>
void forward_3x3(const float* x, const float* weight, const Epilogue& epilogue, const Shape& s, float* y) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  WorkStealingTasks planes((std::ptrdiff_t)s.batch * s.channels, 4);
#pragma omp parallel
  planes.for_each([&](std::ptrdiff_t plane) {
    const int channel = (int)(plane % s.channels);
    const float* w = weight + (std::ptrdiff_t)channel * 9;
    float taps[9 + kLanes];
    if (!load_weights_3x3(w, taps)) return scalar_forward(x + plane * in, w, epilogue, channel, s, y + plane * out);
    epilogue.with_channel(channel, [&](auto finish) {
      correlate_3x3<S>(Plane<const float>{x + plane * in, s.height, s.width}, taps,
                 Plane<float>{y + plane * out, s.out_height(), s.out_width()}, finish);
    });
  });
}

// dx, dweight and dbias may be null. One thread sums a channel over the batch, in its order.
template <int S>
void backward_3x3(const float* x, const float* weight, const float* dy, const Shape& s, float* dx, float* dweight,
                      float* dbias) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const bool streamed = S == 2 && dx && streams_past_caches(s, dx);
  WorkStealingTasks channels(s.channels);
#pragma omp parallel
  {
    Scratch memory(streamed ? (std::size_t)band_rows(s) * s.width : 0);
    float* const band = streamed ? memory.floats() : nullptr;
    channels.for_each([&](int channel) {
      const float* w = weight + (std::ptrdiff_t)channel * 9;
      float taps[9 + kLanes], rotated[9];
      Vec sums[9] = {}, bias = {};
      const bool finite = load_weights_3x3(w, taps);
      std::reverse_copy(taps, taps + 9, rotated);
      for (int image = 0; image < s.batch; image++) {
        const std::ptrdiff_t index = (std::ptrdiff_t)image * s.channels + channel;
        const Plane<const float> plane = {x + index * in, s.height, s.width};
        const Plane<const float> gradient = {dy + index * out, s.out_height(), s.out_width()};
        const Plane<float> to = {dx ? dx + index * in : nullptr, s.height, s.width};
        if (dx && !finite) {
          scalar_input_gradient(gradient.data, w, s, to.data);
        } else if (dx && S == 1) {
          correlate_3x3<1>(gradient, rotated, to, Identity{});
        } else if (dx) {
          input_gradient_stride2(gradient, taps, to, band, dweight ? plane.data : to.data);
        }
        if (dweight) {
          if (s.out_width() <= kLanes) {
            weight_gradient_3x3<S>(plane, gradient, sums);
          } else {  // of each plane by itself, so that small terms do not drown in large sums
            Vec products[9] = {};
            weight_gradient_3x3<S>(plane, gradient, products);
            for (int i = 0; i < 9; i++) sums[i] += products[i];
          }
        }
        if (dbias) {
          Vec sum = {};
          for (std::ptrdiff_t i = 0; i < out; i += kLanes) sum += load_clamped(gradient.data + i, out - i);
          bias += sum;
        }
      }
      if (dweight) {
        float sum[9 + kLanes] = {};  // whole vectors are read
        for (int i = 0; i < 9; i++) sum[i] = sum_lanes(sums[i]);
        float* to = dweight + (std::ptrdiff_t)channel * 9;
        if (all_finite(sum, 9)) {
          write_row(sum, 9, to, to + 9);
        } else {
          scalar_weight_gradient(x + channel * in, dy + channel * out, s, to);
        }
      }
      if (dbias) store_partial(dbias + channel, splat(sum_lanes(bias)), 1);
    });
#if defined(__AVX512F__)
    if (streamed) _mm_sfence();  // so that other threads see what was written
#endif
  }
}

}  // namespace large_kernel
