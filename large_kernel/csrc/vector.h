// SIMD vectors of float for the target of this compilation, and transposition between NCHW planes and vectors of
// channels. GCC/Clang vector extensions only: AVX-512, AVX and all other targets (NEON, SSE) are compiled from the same
// source.
#pragma once
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LK_INLINE __attribute__((always_inline)) inline

namespace large_kernel {

// LK_LANES: floats per vector. The tests set it to 16 to run the code for AVX-512 on other processors, where the compiler
// replaces each vector by several.
#if !defined(LK_LANES)
#if defined(__AVX512F__)
#define LK_LANES 16
#elif defined(__AVX__)
#define LK_LANES 8
#else
#define LK_LANES 4
#endif
#endif

constexpr int kLanes = LK_LANES;
#if LK_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VecU32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI32 __attribute__((vector_size(kLanes * 4)));

LK_INLINE Vec splat(float value) { return value - Vec{}; }

// a / b, accurate to one unit in the last place where 1 / b is a normal number. Much faster than a division of 16
// lanes.
LK_INLINE Vec divide(Vec a, Vec b) {
#if defined(__AVX512F__)
  // the mask avoids a GCC 12 warning in its own header
  const Vec reciprocal = (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)b);
  const Vec quotient = a * reciprocal;
  return quotient + reciprocal * (a - b * quotient);
#else
  return a / b;
#endif
}

// ---- kLanes consecutive elements, at any address ----

LK_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
LK_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// Only the first n <= kLanes elements; memory past them is not accessed.
#if defined(__AVX512F__)
LK_INLINE Vec load_partial(const float* p, int n) { return (Vec)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
LK_INLINE void store_partial(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
#elif defined(__AVX2__) && LK_LANES == 8
LK_INLINE __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LK_INLINE Vec load_partial(const float* p, int n) { return (Vec)_mm256_maskload_ps(p, lane_mask(n)); }
LK_INLINE void store_partial(float* p, Vec v, int n) { _mm256_maskstore_ps(p, lane_mask(n), (__m256)v); }
#else
LK_INLINE Vec load_partial(const float* p, int n) {
  Vec v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
LK_INLINE void store_partial(float* p, Vec v, int n) { std::memcpy(p, &v, n * sizeof(float)); }
#endif

// The same for any n: no lanes if n <= 0, all lanes if n >= kLanes.
LK_INLINE Vec load_clamped(const float* p, std::ptrdiff_t n) {
  return n >= kLanes ? load(p) : n > 0 ? load_partial(p, (int)n) : Vec{};
}

LK_INLINE void store_clamped(float* p, Vec v, std::ptrdiff_t n) {
  if (n >= kLanes) return store(p, v);
  if (n > 0) store_partial(p, v, (int)n);
}

// The same with n fixed in advance.
struct LaneMask {
#if defined(__AVX512F__)
  __mmask16 mask;
  LK_INLINE explicit LaneMask(std::ptrdiff_t n) : mask(n >= kLanes ? 0xffff : n > 0 ? (1u << n) - 1 : 0) {}
  LK_INLINE Vec read(const float* p) const { return (Vec)_mm512_maskz_loadu_ps(mask, p); }
  LK_INLINE void write(float* p, Vec v) const { _mm512_mask_storeu_ps(p, mask, (__m512)v); }
#else
  std::ptrdiff_t n;
  LK_INLINE explicit LaneMask(std::ptrdiff_t n) : n(n) {}
  LK_INLINE Vec read(const float* p) const { return load_clamped(p, n); }
  LK_INLINE void write(float* p, Vec v) const { store_clamped(p, v, n); }
#endif
};

LK_INLINE Vec keep_first(Vec v, int n) {
  VecI32 lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return (Vec)((VecU32)v & (VecU32)(lane < n));
}

// Copies of rows of `count` floats from and to tensors, in whole vectors unless these would pass `end`. copy_row writes
// whole vectors, with zeros after the row; write_row reads whole vectors and may write past the row, though not past
// `end`.
LK_INLINE Vec load_row(const float* from, int count, const float* end) {
  if (count >= kLanes) return load(from);
  if (count <= 0) return Vec{};
  return end - from >= kLanes ? keep_first(load(from), count) : load_partial(from, count);
}

LK_INLINE void copy_row(const float* from, int count, const float* end, float* to) {
  for (int i = 0; i < count; i += kLanes) store(to + i, load_row(from + i, count - i, end));
}

LK_INLINE void write_row(const float* from, int count, float* to, const float* end) {
  for (int i = 0; i < count; i += kLanes) {
    if (end - (to + i) >= kLanes) {
      store(to + i, load(from + i));
    } else {
      store_partial(to + i, load(from + i), count - i < kLanes ? count - i : kLanes);
    }
  }
}

// ---- kLanes planes in memory <-> one vector of channels per pixel ----

#if defined(__clang__)
#define LK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI32{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... in two vectors, and the inverse.
LK_INLINE void interleave(Vec a, Vec b, Vec* out) {
#if LK_LANES == 16
  out[0] = LK_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  out[1] = LK_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LK_LANES == 8
  out[0] = LK_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  out[1] = LK_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  out[0] = LK_SHUFFLE(a, b, 0, 4, 1, 5);
  out[1] = LK_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

LK_INLINE void deinterleave(Vec a, Vec b, Vec* even, Vec* odd) {
#if LK_LANES == 16
  *even = LK_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *odd = LK_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LK_LANES == 8
  *even = LK_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  *odd = LK_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  *even = LK_SHUFFLE(a, b, 0, 2, 4, 6);
  *odd = LK_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

LK_INLINE Vec reverse(Vec v) {
#if LK_LANES == 16
  return LK_SHUFFLE(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#elif LK_LANES == 8
  return LK_SHUFFLE(v, v, 7, 6, 5, 4, 3, 2, 1, 0);
#else
  return LK_SHUFFLE(v, v, 3, 2, 1, 0);
#endif
}

// The lanes of b shifted up by one; lane 0 is the last lane of a.
LK_INLINE Vec shift_lanes_up(Vec a, Vec b) {
#if LK_LANES == 16
  return LK_SHUFFLE(a, b, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
#elif LK_LANES == 8
  return LK_SHUFFLE(a, b, 7, 8, 9, 10, 11, 12, 13, 14);
#else
  return LK_SHUFFLE(a, b, 3, 4, 5, 6);
#endif
}

LK_INLINE float sum_lanes(Vec v) {
#if LK_LANES == 16
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

// Shuffles are fast if they move whole groups of four lanes (128 bits) or stay within a group. The even and the odd
// groups of a and b.
LK_INLINE void deinterleave_groups([[maybe_unused]] Vec* a, [[maybe_unused]] Vec* b) {
#if LK_LANES == 16
  const Vec even = LK_SHUFFLE(*a, *b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  *b = LK_SHUFFLE(*a, *b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  *a = even;
#elif LK_LANES == 8
  const Vec even = LK_SHUFFLE(*a, *b, 0, 1, 2, 3, 8, 9, 10, 11);
  *b = LK_SHUFFLE(*a, *b, 4, 5, 6, 7, 12, 13, 14, 15);
  *a = even;
#endif
}

// a0 b0 a1 b1 and a2 b2 a3 b3 of each group.
LK_INLINE void interleave_in_groups(Vec a, Vec b, Vec* low, Vec* high) {
#if LK_LANES == 16
  *low = LK_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  *high = LK_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif LK_LANES == 8
  *low = LK_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  *high = LK_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  *low = LK_SHUFFLE(a, b, 0, 4, 1, 5);
  *high = LK_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// a0 a1 b0 b1 and a2 a3 b2 b3 of each group.
LK_INLINE void interleave_pairs_in_groups(Vec a, Vec b, Vec* low, Vec* high) {
#if LK_LANES == 16
  *low = LK_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  *high = LK_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif LK_LANES == 8
  *low = LK_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
  *high = LK_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  *low = LK_SHUFFLE(a, b, 0, 1, 4, 5);
  *high = LK_SHUFFLE(a, b, 2, 3, 6, 7);
#endif
}

// A kLanes x kLanes matrix, transposed as a matrix of 4x4 blocks and then within each block.
LK_INLINE void transpose(Vec* rows) {
#pragma GCC unroll 2
  for (int distance = 4; distance < kLanes; distance *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      Vec* const row = rows + i / distance * 2 * distance + i % distance;
      deinterleave_groups(row, row + distance);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    Vec pairs[4];
    interleave_in_groups(rows[i], rows[i + 1], pairs, pairs + 1);
    interleave_in_groups(rows[i + 2], rows[i + 3], pairs + 2, pairs + 3);
    interleave_pairs_in_groups(pairs[0], pairs[2], rows + i, rows + i + 1);
    interleave_pairs_in_groups(pairs[1], pairs[3], rows + i + 2, rows + i + 3);
  }
}

// Calls full(i) for windows of kLanes elements that cover [0, count); the last window may overlap the one before. Calls
// part() instead if count < kLanes.
template <class Full, class Part>
LK_INLINE void for_each_window(int count, Full full, Part part) {
  if (count < kLanes) return part();
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) full(i);
  if (i < count) full(count - kLanes);
}

// Transposes `channels` <= kLanes planes of `count` elements into [count] vectors, `step` vectors apart. Lanes past the
// last channel repeat it, so that they compute the same result and unpack may write it twice.
inline void pack(const float* planes, std::ptrdiff_t plane_stride, int channels, int count, Vec* out, int step = 1) {
  const float* plane[kLanes];
  for (int c = 0; c < kLanes; c++) plane[c] = planes + (c < channels ? c : channels - 1) * plane_stride;
  for_each_window(count, [&](int i) {
    Vec rows[kLanes];
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; c++) rows[c] = load(plane[c] + i);
    transpose(rows);
    Vec* to = out + i * step;
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; j++, to += step) *to = rows[j];
  }, [&] {
    Vec rows[kLanes];
    for (int c = 0; c < kLanes; c++) rows[c] = load_partial(plane[c], count);
    transpose(rows);
    for (int j = 0; j < count; j++) out[j * step] = rows[j];
  });
}

// One value per channel, in the lanes that pack uses.
LK_INLINE Vec load_lanes(const float* p, int channels) {
  Vec v;
  for (int c = 0; c < kLanes; c++) v[c] = p[c < channels ? c : channels - 1];
  return v;
}

struct Identity {
  LK_INLINE Vec operator()(Vec v) const { return v; }
};

// The inverse of pack. Writes finish(vector) plus `added`, which is laid out like the result; `finish` may differ by
// channel.
template <class F = Identity>
inline void unpack(const Vec* in, int count, float* planes, std::ptrdiff_t plane_stride, int channels, F finish = {},
                   const float* added = nullptr) {
  float* plane[kLanes];
  for (int c = 0; c < kLanes; c++) plane[c] = planes + (c < channels ? c : channels - 1) * plane_stride;
  const std::ptrdiff_t to_added = added ? added - planes : 0;
  for_each_window(count, [&](int i) {
    Vec rows[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; j++) rows[j] = finish(in[i + j]);
    transpose(rows);
    if (added) {
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; c++) rows[c] += load(plane[c] + to_added + i);
    }
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; c++) store(plane[c] + i, rows[c]);
  }, [&] {
    Vec rows[kLanes] = {};
    for (int j = 0; j < count; j++) rows[j] = finish(in[j]);
    transpose(rows);
    for (int c = 0; c < channels; c++) {
      store_partial(plane[c], added ? rows[c] + load_partial(plane[c] + to_added, count) : rows[c], count);
    }
  });
}

// Whether the L1 data cache has 48 KB. Most processors with such a cache (Intel servers since Ice Lake, AMD since Zen
// 5) also execute two multiply-adds of the widest vectors per cycle, so that loads and additions are relatively more
// expensive.
inline bool has_large_l1() {
#if defined(LK_LARGE_L1)  // the tests set this to cover both cases
  return LK_LARGE_L1;
#elif defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
  return large;
#else
  return false;
#endif
}

// ---- scratch memory, aligned for vectors ----

class Scratch {
 public:
  explicit Scratch(std::size_t floats)
      : data_(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return data_; }
  Vec* vectors() const { return reinterpret_cast<Vec*>(data_); }

 private:
  float* data_;
};

}  // namespace large_kernel
