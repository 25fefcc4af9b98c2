// The discrete Fourier transform of rows of pixels and of rows of taps, in registers: there a correlation is a product.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "vector.h"

namespace dwconv {

// Calls f with 0 ... N - 1, as types: loops over arrays that are to be registers.
template <class F, int... I>
DW_INLINE void for_constants(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
DW_INLINE void for_constants(F f) {
  for_constants(std::make_integer_sequence<int, N>{}, f);
}

// Transforms of length 4 M, M odd: of any row, or of 2 M pixels and of the 4 M - 1 taps that reach from each of them to each,
// none around the end. Element n has two indices, n mod 4 and n mod M, and the transform is one of length 4 along the first and
// one of length M along the second, without factors in between (Good, 1958). The 4 M real numbers that make up the frequencies of
// a row are kept as 2 M pairs: two real frequencies in pair 0, complex ones, some conjugated, in the others.
template <int M>
class Dft {
 public:
  static constexpr int kPairs = 2 * M, kPixels = 2 * M;

  // There and back, with a scale of 1, is a product with 2 M.
  explicit Dft(float scale = 1) : one_(splat(scale)), half_(splat(scale / 2)) {
    for (int i = 0; i <= kHalf; i++) {
      const double angle = 2 * 3.14159265358979323846 * i / M;
      cosine_[i] = splat(scale * (float)std::cos(angle)), sine_[i] = splat(scale * (float)std::sin(angle));
    }
  }

  // Calls put(pair, first, second) for the frequencies of x [2 M].
  template <class Put>
  DW_INLINE void pixels(const Vec* x, Put put) const {
    auto even = [&](auto b) { return x[b % 2 ? b + M : b]; };
    auto odd = [&](auto b) { return x[b % 2 ? b : b + M]; };
    frequencies([&](auto b) { return even(b) + odd(b); }, [&](auto b) { return even(b) - odd(b); },
                [&](auto b) { return (b % 2 ? b + M : b) % 4 == 0 ? even(b) : -even(b); },
                [&](auto b) { return (b % 2 ? b : b + M) % 4 == 3 ? odd(b) : -odd(b); }, put);
  }

  // The same for the taps from -2 M + 1 to 2 M - 1, read in reverse, as a correlation has them. `middle` is tap 0.
  template <class Put>
  DW_INLINE void taps(const Vec* middle, Put put) const {
    row([&](auto n) { return n == 2 * M ? Vec{} : middle[n < 2 * M ? -n : 4 * M - n]; }, put);
  }

  // The same for 4 M numbers get(n).
  template <class Get, class Put>
  DW_INLINE void row(Get get, Put put) const {
    Vec sum[M], alternating[M], re[M], im[M];
    for_constants<M>([&](auto b) {
      Vec v[4];
      for_constants<4>([&](auto i) { v[(b + i * M) % 4] = get(std::integral_constant<int, b + i * M>{}); });
      const Vec even = v[0] + v[2], odd = v[1] + v[3];
      sum[b] = even + odd, alternating[b] = even - odd;
      re[b] = v[0] - v[2], im[b] = v[3] - v[1];
    });
    frequencies([&](auto b) { return sum[b]; }, [&](auto b) { return alternating[b]; }, [&](auto b) { return re[b]; },
                [&](auto b) { return im[b]; }, put);
  }

  // From frequencies get(pair, 0 or 1): calls put(n, value) for all 4 M numbers.
  template <class Get, class Put>
  DW_INLINE void back(Get get, Put put) const {
    // number n and the one 2 M further, where the transform of length 4 has the opposite sign
    auto put_both = [&](auto n, bool plus, Vec a, Vec b) {
      put(n, plus ? a + b : a - b);
      put(std::integral_constant<int, (n + 2 * M) % (4 * M)>{}, plus ? a - b : a + b);
    };
    Vec c[kHalf], s[kHalf], sum[M], alternating[M];
    for_constants<kHalf>([&](auto q) { c[q] = get(1 + q, 0), s[q] = get(1 + q, 1); });
    from_real(half_ * get(0, 0), c, s, [&](auto b, Vec v) { sum[b] = v; });
    for_constants<kHalf>([&](auto q) { c[q] = get(1 + kHalf + q, 0), s[q] = get(1 + kHalf + q, 1); });
    from_real(half_ * get(0, 1), c, s, [&](auto b, Vec v) { alternating[b] = sum[b] - v, sum[b] += v; });
    for_constants<kHalf>([&](auto q) {
      constexpr int near = M + 1 + q, far = near + kHalf;
      c[q] = get(near, 0) + get(far, 0), s[q] = get(far, 1) - get(near, 1);
    });
    from_real(one_ * get(M, 0), c, s, [&](auto b, Vec v) {
      constexpr int n = b % 2 ? b + M : b;
      put_both(std::integral_constant<int, n>{}, n % 4 == 0, sum[b], v);
    });
    for_constants<kHalf>([&](auto q) {
      constexpr int near = M + 1 + q, far = near + kHalf;
      c[q] = get(near, 1) + get(far, 1), s[q] = get(near, 0) - get(far, 0);
    });
    from_real(one_ * get(M, 1), c, s, [&](auto b, Vec v) {
      constexpr int n = b % 2 ? b : b + M;
      put_both(std::integral_constant<int, n>{}, n % 4 == 3, alternating[b], v);
    });
  }

 private:
  static constexpr int kHalf = (M - 1) / 2;

  Vec one_, half_, cosine_[kHalf + 1], sine_[kHalf + 1];

  // start + the sum over b = 1 ... kHalf of cos(2 pi Q b / M) v[b - 1]
  template <int Q>
  DW_INLINE Vec cosines(Vec start, const Vec* v) const {
    for_constants<kHalf>([&](auto b) {
      constexpr int i = Q * (b + 1) % M;
      start += cosine_[std::min(i, M - i)] * v[b];
    });
    return start;
  }

  template <int Q>
  DW_INLINE Vec sines(const Vec* v) const {
    Vec total = {};
    for_constants<kHalf>([&](auto b) {
      constexpr int i = Q * (b + 1) % M;
      if constexpr (i > kHalf) total -= sine_[M - i] * v[b];
      else total += sine_[i] * v[b];
    });
    return total;
  }

  // Of M real numbers v(0) ... v(M - 1): their sum, which is returned, and frequency q = 1 ... kHalf as c[q - 1] - i s[q - 1].
  template <class V>
  DW_INLINE Vec real(V v, Vec* c, Vec* s) const {
    using std::integral_constant;
    Vec even[kHalf], odd[kHalf];
    const Vec first = v(integral_constant<int, 0>{});
    Vec sum = first;
    for_constants<kHalf>([&](auto b) {
      const Vec low = v(integral_constant<int, b + 1>{}), high = v(integral_constant<int, M - 1 - b>{});
      even[b] = low + high, odd[b] = low - high;
      sum += even[b];
    });
    for_constants<kHalf>([&](auto q) { c[q] = cosines<q + 1>(first, even), s[q] = sines<q + 1>(odd); });
    return sum;
  }

  // Calls put(b, v[b]), v[b] = zero + the sum over q = 1 ... kHalf of cos(2 pi q b / M) c[q - 1] + sin(2 pi q b / M) s[q - 1],
  // but for zero scaled.
  template <class Put>
  DW_INLINE void from_real(Vec zero, const Vec* c, const Vec* s, Put put) const {
    using std::integral_constant;
    Vec all = zero;
    for_constants<kHalf>([&](auto q) { all += one_ * c[q]; });
    put(integral_constant<int, 0>{}, all);
    for_constants<kHalf>([&](auto b) {
      const Vec even = cosines<b + 1>(zero, c), odd = sines<b + 1>(s);
      put(integral_constant<int, b + 1>{}, even + odd);
      put(integral_constant<int, M - 1 - b>{}, even - odd);
    });
  }

  // The transforms of length M, of what that of length 4 made of real numbers: two real rows and a complex one.
  template <class Sum, class Alternating, class Re, class Im, class Put>
  DW_INLINE void frequencies(Sum sum, Alternating alternating, Re re, Im im, Put put) const {
    Vec c[kHalf], s[kHalf], ci[kHalf], si[kHalf];
    const Vec zero = real(sum, c, s);
    for_constants<kHalf>([&](auto q) { put(1 + q, c[q], s[q]); });
    put(0, zero, real(alternating, c, s));
    for_constants<kHalf>([&](auto q) { put(1 + kHalf + q, c[q], s[q]); });
    const Vec zero_re = real(re, c, s);
    put(M, zero_re, real(im, ci, si));
    for_constants<kHalf>([&](auto q) {
      put(M + 1 + q, c[q] + si[q], ci[q] - s[q]);
      put(M + 1 + kHalf + q, c[q] - si[q], ci[q] + s[q]);
    });
  }
};

}  // namespace dwconv
