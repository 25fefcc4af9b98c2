// Forward pass and input gradient on tensor cores (compute capability 8.0 and up).
//
// Along a row a convolution is a product with a banded Toeplitz matrix:
//
//     y[row, xo] += x[row + ky - p, xi] T[xi, xo]     T[xi, xo] = w[ky][xi - xo + p]
//
//            columns of x        xo
//          +-------------+    +-------+      rows of the output, of several images: M of mma.m16n8k16
//     rows | 16 x 16     |  xi| \ \   |      columns of the input: K
//          |             |    |  \ \  |      columns of the output: N
//          +-------------+    +-------+
//
// Another ky only moves the addresses of rows, so nothing is copied for it. A fragment of T depends on xi - xo alone: it
// is 2 R + 1 pairs of neighbouring taps, read from two copies of the kernel's row, of which one is shifted by an element,
// so that every pair is aligned. Blocks of T outside the band are left out at compile time. float32 is three bfloat16
// parts, six products, summed per ky first because matrix units cut off where they add.
#pragma once
#include "exact.cuh"
#include "stage.cuh"

namespace large_kernel::cuda {

constexpr int PADW = 16;  // zeros left of a kernel row
__host__ __device__ constexpr int weight_ld(int K) { return (K + 2 * PADW + 2) & ~1; }

constexpr int MT = 2, WARPS = 7, ROWS = MT * WARPS * 16;  // rows of a block: MT tiles of 16 for each warp

// How a launch is divided: a block has one channel, a tile of 8 NT columns and a band of rows, and goes through its share
// of the images, `images` planes at a time, in `buffers` buffers.
struct ForwardTile {
  int images, band, buffers, column_tiles, shares;
};

// A block's T: the taps of its channel, in two copies, zeros around each row.
template <typename In, typename T, int PARTS>
__device__ __forceinline__ void stage_taps(const Forward<In>& f, T* ws, int c) {
  const int K = f.s.K, ld = weight_ld(K), part = 2 * K * ld;
#pragma unroll 4
  for (int u = threadIdx.x; u < K * K; u += blockDim.x) {
    const int ky = u / K, t = u - ky * K;
    T q[PARTS];
    split<In, T, PARTS>(from_float<In>(f.w[f.tap(c, u)]), q);
#pragma unroll
    for (int a = 0; a < PARTS; a++) {
      ws[a * part + ky * ld + PADW + t] = q[a];
      ws[a * part + (K + ky) * ld + PADW + 1 + t] = q[a];
    }
  }
}

// acc += one 16-row tile of x, at `address`, times T of one ky.
template <typename T, int PARTS, int NT, int KT, int OFF8, int R>
__device__ __forceinline__ void multiply_row(float (&acc)[NT][4], uint32_t address, int part,
                                             const uint32_t (&b)[PARTS][2 * R + 3]) {
  using P = Products<PARTS>;
#pragma unroll
  for (int kt = 0; kt < KT; kt++) {
    uint32_t a[PARTS][4];
#pragma unroll
    for (int k = 0; k < PARTS; k++) load_matrices(a[k], address + (uint32_t)((k * part + 16 * kt) * (int)sizeof(T)));
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const int d = 2 * kt - j - OFF8;  // xi - xo of the block, in eights
      if (d < -R - 1 || d > R) continue;
      const int f = d + R + 1;
#pragma unroll
      for (int m = 0; m < P::COUNT; m++) {
        const int ia = P::a(m), ib = P::b(m);
        if (d == -R - 1)
          mma8<T>(acc[j], a[ia][2], a[ia][3], b[ib][f + 1]);
        else if (d == R)
          mma8<T>(acc[j], a[ia][0], a[ia][1], b[ib][f]);
        else
          mma16<T>(acc[j], a[ia], b[ib][f], b[ib][f + 1]);
      }
    }
  }
}

// Writes columns x0 + 8 j + 2 q and the next one of a row; returns whether a sum is not finite.
template <typename In, int NT>
__device__ __forceinline__ bool write_row(const Forward<In>& f, In* out, const float (&acc)[NT][4], int half, int x0,
                                          int q, float shift) {
  const int W = f.s.W;
  bool bad = false;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const int xo = x0 + 8 * j + 2 * q;
    const float v0 = f.activate(acc[j][2 * half] + shift), v1 = f.activate(acc[j][2 * half + 1] + shift);
    bad |= (xo < W && !isfinite(v0)) || (xo + 1 < W && !isfinite(v1));
    if ((W & 1) == 0) {
      if (xo < W) {
        alignas(8) In pair[2] = {from_float<In>(v0), from_float<In>(v1)};
        if constexpr (sizeof(In) == 2)
          *(uint32_t*)(out + xo) = *(uint32_t*)pair;
        else
          *(uint2*)(out + xo) = *(uint2*)pair;
      }
    } else {
      if (xo < W) out[xo] = from_float<In>(v0);
      if (xo + 1 < W) out[xo + 1] = from_float<In>(v1);
    }
  }
  return bad;
}

template <typename In, int NT, int KT, int OFF8, int R>
__global__ void __launch_bounds__(WARPS * 32) tensor_core_forward(Forward<In> f, ForwardTile t) {
#ifdef LARGE_KERNEL_TENSOR_CORES
  using T = typename Unit<In>::T;
  constexpr int PARTS = Unit<In>::PARTS, LD = 16 * KT + 8, TW = 8 * NT;
  const Shape& s = f.s;
  const int K = s.K, p = K / 2, LDW = weight_ld(K), images = t.images, band = t.band;
  const int bands = (s.H + band - 1) / band, groups = (s.N + images - 1) / images;
  int job = blockIdx.x;
  const int tile = job % t.column_tiles;
  job /= t.column_tiles;
  const int y0 = (job % bands) * band;
  job /= bands;
  const int share = job % t.shares, c = job / t.shares;
  const int first = (int)((long long)groups * share / t.shares);
  const int last = (int)((long long)groups * (share + 1) / t.shares);
  const int x0 = tile * TW;
  const int r0 = max(0, y0 - p), r1 = min(s.H, y0 + band + p), SR = r1 - r0, rows = images * SR;
  T* xs = (T*)dynamic_shared_memory();
  const int part = (rows + 1) * LD, buffer = PARTS * part, wpart = 2 * K * LDW;
  T* ws = xs + t.buffers * buffer;
  auto fetch = [&](int group, int to) {
    stage<In, T, PARTS, 16 * KT, LD>(f.x, xs + to * buffer, part, s, c, group * images, images, r0, r1, x0 - 8 * OFF8);
    copy_commit();
  };

  fetch(first, 0);
  for (int u = threadIdx.x; u < t.buffers * PARTS * LD; u += blockDim.x)  // a row of zeros after each part
    xs[(u / LD) * part + rows * LD + u % LD] = from_float<T>(0.f);
  for (int u = threadIdx.x; u < wpart * PARTS; u += blockDim.x) ws[u] = from_float<T>(0.f);
  __syncthreads();
  stage_taps<In, T, PARTS>(f, ws, c);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  int ly[MT];         // this lane's row of ldmatrix: y - p, far outside where there is none
  uint32_t base[MT];  // address of its row "y - p" (virtual), first column
  int kmin = K, kmax = -1;
  const uint32_t start = shared_address(xs);
  const uint32_t zero_row = start + (uint32_t)((rows * LD + (lane >> 4) * 8) * (int)sizeof(T));
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
    const int m = (warp * MT + mt) * 16 + (lane & 15), i = m / band, yy = y0 + m - i * band;
    const bool valid = i < images && yy < s.H;
    ly[mt] = valid ? yy - p : -(1 << 20);
    base[mt] = start + (uint32_t)(((i * SR + yy - p - r0) * LD + (lane >> 4) * 8) * (int)sizeof(T));
    if (valid) {
      kmin = min(kmin, max(0, p - yy));
      kmax = max(kmax, min(K - 1, s.H - 1 - yy + p));
    }
  }
  kmin = __reduce_min_sync(0xffffffffu, kmin);
  kmax = __reduce_max_sync(0xffffffffu, kmax);
  const int odd = (p - g) & 1;
  // pair at offset o: taps p + o + 2 q - g and the next one
  const T* wlane = ws + odd * K * LDW + (PADW + odd + p + 2 * q - g);
  const float shift = f.shift(c);
  bool bad = false;

  for (int group = first; group < last; group++) {
    const int now = t.buffers == 2 ? (group - first) & 1 : 0;
    if (t.buffers == 2 && group + 1 < last) {
      fetch(group + 1, now ^ 1);
      copy_wait<1>();
    } else
      copy_wait<0>();
    __syncthreads();
    float acc[MT][NT][4];
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[mt][j][e] = 0.f;
    const uint32_t moved = (uint32_t)(now * buffer * (int)sizeof(T));
#pragma unroll 1
    for (int ky = kmin; ky <= kmax; ky++) {
      uint32_t b[PARTS][2 * R + 3];
#pragma unroll
      for (int a = 0; a < PARTS; a++) {
        b[a][0] = 0;
        b[a][2 * R + 2] = 0;
#pragma unroll
        for (int o = -R; o <= R; o++) b[a][o + R + 1] = *(const uint32_t*)(wlane + a * wpart + ky * LDW + 8 * o);
      }
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        const bool inside = (unsigned)(ly[mt] + ky) < (unsigned)s.H;
        const uint32_t address = moved + (inside ? base[mt] + (uint32_t)(ky * LD * (int)sizeof(T)) : zero_row);
        if constexpr (PARTS == 1)
          multiply_row<T, PARTS, NT, KT, OFF8, R>(acc[mt], address, part, b);
        else {
          float sum[NT][4];
#pragma unroll
          for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[j][e] = 0.f;
          multiply_row<T, PARTS, NT, KT, OFF8, R>(sum, address, part, b);
#pragma unroll
          for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[mt][j][e] += sum[j][e];
        }
      }
    }
    const int n0 = group * images;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = (warp * MT + mt) * 16 + g + 8 * half, i = m / band, yy = y0 + m - i * band;
        if (i >= images || n0 + i >= s.N || yy >= s.H) continue;
        In* out = f.y + (((size_t)(n0 + i) * s.C + c) * s.H + yy) * s.W;
        bad |= write_row<In, NT>(f, out, acc[mt], half, x0, q, shift);
      }
    __syncthreads();
    if (t.buffers == 1 && group + 1 < last) fetch(group + 1, 0);
  }
  // After the loop, which has no registers to spare.
  if (__syncthreads_or(bad))
    redo_outputs(f, c, first * images, last * images, y0, min(s.H, y0 + band), x0, min(s.W, x0 + TW));
#endif
}

// Planes at a time, band and buffers such that a block fits into `limit` bytes of shared memory: as many rows as the warps
// take, then with one buffer, then fewer. Returns false where not even 16 rows fit.
template <typename Bytes>
bool fit_tile(const Shape& s, int rows, int images, int limit, Bytes bytes, int* found_images, int* band, int* buffers) {
  auto fits = [&](int i, int b) {
    for (int k = 2; k >= 1; k--)
      if (bytes(i, b, k) <= (size_t)limit) {
        *found_images = i, *band = b, *buffers = k;
        return true;
      }
    return false;
  };
  if (s.H <= rows)
    for (int i = images; i >= 1; i /= 2)
      if (fits(i, s.H)) return true;
  for (int bands = (s.H + rows - 1) / rows; (s.H + bands - 1) / bands >= 16; bands++)
    if (fits(1, (s.H + bands - 1) / bands)) return true;
  return false;
}

// Staged rows of a plane for a band of output rows.
inline int staged_rows(const Shape& s, int band) { return band + 2 * (s.K / 2) < s.H ? band + 2 * (s.K / 2) : s.H; }

constexpr int DOES_NOT_FIT = -2;  // the kernels of direct_*.cuh take over

template <typename In, int NT, int KT, int OFF8, int R>
int launch_forward_tile(const Forward<In>& f, const Card& card, cudaStream_t stream) {
  using U = Unit<In>;
  const Shape& s = f.s;
  auto bytes = [&](int images, int band, int buffers) {
    return sizeof(typename U::T) * U::PARTS *
           (buffers * ((size_t)images * staged_rows(s, band) + 1) * (16 * KT + 8) + 2 * (size_t)s.K * weight_ld(s.K));
  };
  int images = s.H <= ROWS ? ROWS / s.H : 1;
  if (U::PARTS > 1) images = (images + 1) / 2;
  ForwardTile t;
  if (!fit_tile(s, ROWS, images < s.N ? images : s.N, card.shared_bytes, bytes, &t.images, &t.band, &t.buffers))
    return DOES_NOT_FIT;
  t.column_tiles = (s.W + 8 * NT - 1) / (8 * NT);
  const int jobs = t.column_tiles * ((s.H + t.band - 1) / t.band) * s.C, groups = (s.N + t.images - 1) / t.images;
  t.shares = (card.multiprocessors * 64 + jobs - 1) / jobs;
  if (t.shares > groups) t.shares = groups;
  return launch(tensor_core_forward<In, NT, KT, OFF8, R>, jobs * t.shares, WARPS * 32,
                bytes(t.images, t.band, t.buffers), stream, f, t);
}

// Tiles of NT eights of columns, read from KT sixteens of input columns, of which OFF8 eights are to the left.
template <typename In, int R>
int tensor_core_forward_width(const Forward<In>& f, const Card& card, cudaStream_t stream) {
  constexpr int O = R <= 2 ? 2 : 4;
  const int W = f.s.W;
  if (W <= 8) return launch_forward_tile<In, 1, 1, 0, R>(f, card, stream);
  if (W <= 16) return launch_forward_tile<In, 2, 1, 0, R>(f, card, stream);
  if (W <= 32) return launch_forward_tile<In, 4, 2, 0, R>(f, card, stream);
  if (W <= 56) return launch_forward_tile<In, 7, 4, 0, R>(f, card, stream);
  return launch_forward_tile<In, 6, 3 + O, O, R>(f, card, stream);
}

// R eights of columns on each side of a block of T hold taps.
template <typename In>
int launch_tensor_core_forward(const Forward<In>& f, const Card& card, cudaStream_t stream) {
  if (f.s.K <= 17) return tensor_core_forward_width<In, 1>(f, card, stream);
  if (f.s.K <= 33) return tensor_core_forward_width<In, 2>(f, card, stream);
  return tensor_core_forward_width<In, 4>(f, card, stream);
}

}  // namespace large_kernel::cuda
