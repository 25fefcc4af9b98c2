// Weight gradient on tensor cores (compute capability 8.0 and up).
//
// dw[ky][kx] = sum over images and pixels of dy[y, x] x[y + ky - p, x + kx - p]. For each ky the products of columns of dy
// and columns of x, summed over rows (K of mma.m16n8k16), form a matrix whose diagonals are the taps:
//
//            columns of x, xi
//          +-----------------+
//       xo |  \   \   \      |     diagonal xi - xo = kx - p: tap kx
//          |   \   \   \     |     blocks with the same xi - xo share their sums: E of them
//          +-----------------+
//
// A warp has KYS of the ky; a block has a group of ky and one channel, and goes through its share of the images. Sums of
// the shares stand in `partial` [splits][C][K][K] and are added in order.
#pragma once
#include "tensor_core_forward.cuh"

namespace large_kernel::cuda {

struct WeightTile {
  int images, band, buffers, column_tiles, splits, ky_groups;
};

constexpr int SCRATCH = 16 * 9 + 2 * 64;  // floats of a warp: a block of the matrix, and a row of taps

// Adds the diagonals of a warp's sums of one ky up to a row of taps and writes it.
template <int MTO, int NTI, int OFF8, int R>
__device__ __forceinline__ void write_taps(const float (&acc)[MTO][2 * R + 2][4], float* block, float* to, int K) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, p = K / 2;
  float* line = block + 16 * 9;
  for (int t = lane; t < 64; t += 32) line[t] = 0.f;
  __syncwarp();
#pragma unroll
  for (int mt = 0; mt < MTO; mt++)
#pragma unroll
    for (int e = -R; e <= R + 1; e++) {
      const int j = e + OFF8 + 2 * mt;
      if (j < 0 || j >= NTI) continue;
      const float* v = acc[mt][e + R];
      block[g * 9 + 2 * q] = v[0];
      block[g * 9 + 2 * q + 1] = v[1];
      block[(g + 8) * 9 + 2 * q] = v[2];
      block[(g + 8) * 9 + 2 * q + 1] = v[3];
      __syncwarp();
      if (lane < 23) {
        float sum = 0.f;
        for (int m = 0; m < 16; m++) {
          const int col = m + lane - 15;
          if (col >= 0 && col < 8) sum += block[m * 9 + col];
        }
        const int tap = 8 * e + lane - 15 + p;
        if (tap >= 0 && tap < K) line[tap] += sum;
      }
      __syncwarp();
    }
  if (to)
    for (int t = lane; t < K; t += 32) to[t] = line[t];
  __syncwarp();
}

template <typename In, int MTO, int NTI, int OFF8, int R, int KYS, int WWARPS>
__global__ void __launch_bounds__(WWARPS * 32)
    tensor_core_weight_gradient(const In* x, const In* dy, float* partial, Shape s, WeightTile t) {
#ifdef LARGE_KERNEL_TENSOR_CORES
  using T = typename Unit<In>::T;
  using P = Products<Unit<In>::PARTS>;
  constexpr int PARTS = Unit<In>::PARTS, COLSY = 16 * MTO, COLSX = ((8 * NTI + 15) / 16) * 16;
  constexpr int LDY = COLSY + 8, LDX = COLSX + 8, E = 2 * R + 2;
  const int K = s.K, p = K / 2, images = t.images, band = t.band;
  int job = blockIdx.x;
  const int ky_group = job % t.ky_groups;
  job /= t.ky_groups;
  const int share = job % t.splits, c = job / t.splits;
  const int bands = (s.H + band - 1) / band, SRX = min(s.H, band + 2 * p);
  T* xs = (T*)dynamic_shared_memory();
  const int xpart = (images * SRX + 1) * LDX, ypart = (images * band + 1) * LDY, buffer = PARTS * (xpart + ypart);
  float* scratch = (float*)(xs + t.buffers * buffer);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, mat = lane >> 3, sub = lane & 7;
  const int ky0 = (ky_group * WWARPS + warp) * KYS;
  float acc[KYS][MTO][E][4];
#pragma unroll
  for (int a = 0; a < KYS; a++)
#pragma unroll
    for (int i = 0; i < MTO; i++)
#pragma unroll
      for (int e = 0; e < E; e++)
#pragma unroll
        for (int k = 0; k < 4; k++) acc[a][i][e][k] = 0.f;
  for (int k = 0; k < t.buffers; k++) {  // a row of zeros after each part
    T* rows = xs + k * buffer;
    for (int u = threadIdx.x; u < PARTS * LDX; u += blockDim.x)
      rows[(u / LDX) * xpart + images * SRX * LDX + u % LDX] = from_float<T>(0.f);
    for (int u = threadIdx.x; u < PARTS * LDY; u += blockDim.x)
      rows[PARTS * xpart + (u / LDY) * ypart + images * band * LDY + u % LDY] = from_float<T>(0.f);
  }
  const int groups = (s.N + images - 1) / images, per = bands * t.column_tiles;
  const int first = (int)((long long)groups * share / t.splits) * per;
  const int last = (int)((long long)groups * (share + 1) / t.splits) * per;
  auto fetch = [&](int it, int k) {
    const int tile = it % t.column_tiles, y0 = (it / t.column_tiles) % bands * band, n0 = it / per * images;
    const int r0 = max(0, y0 - p), r1 = min(s.H, y0 + band + p), x0 = tile * COLSY;
    T* to = xs + k * buffer;
    stage<In, T, PARTS, COLSX, LDX>(x, to, xpart, s, c, n0, images, r0, r1, x0 - 8 * OFF8);
    stage<In, T, PARTS, COLSY, LDY>(dy, to + PARTS * xpart, ypart, s, c, n0, images, y0, min(s.H, y0 + band), x0);
    copy_commit();
  };
  fetch(first, 0);
  for (int it = first; it < last; it++) {
    const int now = t.buffers == 2 ? (it - first) & 1 : 0;
    const int y0 = (it / t.column_tiles) % bands * band;
    const int r0 = max(0, y0 - p), SR = min(s.H, y0 + band + p) - r0, rows = min(band, s.H - y0);
    if (t.buffers == 2 && it + 1 < last) {
      fetch(it + 1, now ^ 1);
      copy_wait<1>();
    } else
      copy_wait<0>();
    __syncthreads();
    T* const xb0 = xs + now * buffer;
    T* const yb0 = xb0 + PARTS * xpart;
    const float inverse = 1.f / rows;
    const int total = images * rows;
    if (ky0 < K)
      for (int k0 = 0; k0 < total; k0 += 16) {
        // A: rows of dy, transposed. Lane's row k = (mat / 2) * 8 + sub, columns (mat % 2) * 8.
        const int ka = k0 + (mat >> 1) * 8 + sub;
        const uint32_t ya = shared_address(yb0 + (ka < total ? ka : images * band) * LDY + (mat & 1) * 8);
        // B: rows of x, transposed. Lane's row k = (mat % 2) * 8 + sub, columns (mat / 2) * 8.
        const int kb = k0 + (mat & 1) * 8 + sub, i = (int)((kb + .5f) * inverse), yy = y0 + kb - i * rows;
        uint32_t a[MTO][PARTS][4];
#pragma unroll
        for (int mt = 0; mt < MTO; mt++)
#pragma unroll
          for (int k = 0; k < PARTS; k++)
            load_matrices_transposed(a[mt][k], ya + (uint32_t)((k * ypart + 16 * mt) * sizeof(T)));
#pragma unroll
        for (int n = 0; n < KYS; n++) {
          const int r = yy + ky0 + n - p;
          const bool inside = kb < total && (unsigned)r < (unsigned)s.H;
          const uint32_t xb = shared_address(xb0 + (inside ? i * SR + r - r0 : images * SRX) * LDX + (mat >> 1) * 8);
#pragma unroll
          for (int j = 0; j < NTI; j += 2) {
            uint32_t b[PARTS][4];
#pragma unroll
            for (int k = 0; k < PARTS; k++)
              load_matrices_transposed(b[k], xb + (uint32_t)((k * xpart + 8 * j) * sizeof(T)));
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
              for (int mt = 0; mt < MTO; mt++) {
                const int e = j + h - OFF8 - 2 * mt;
                if (j + h >= NTI || e < -R || e > R + 1) continue;
#pragma unroll
                for (int m = 0; m < P::COUNT; m++)
                  mma16<T>(acc[n][mt][e + R], a[mt][P::a(m)], b[P::b(m)][2 * h], b[P::b(m)][2 * h + 1]);
              }
          }
        }
      }
    __syncthreads();
    if (t.buffers == 1 && it + 1 < last) fetch(it + 1, 0);
  }
#pragma unroll
  for (int n = 0; n < KYS; n++)
    write_taps<MTO, NTI, OFF8, R>(
        acc[n], scratch + warp * SCRATCH,
        ky0 + n < K ? partial + (((size_t)share * s.C + c) * K + ky0 + n) * K : nullptr, K);
#endif
}

constexpr int MAX_SPLITS = 32;

// Powers of two of shares until `blocks` times as many fill the card.
inline int weight_splits(int blocks, int groups, const Card& card) {
  int splits = 1;
  while (splits * 2 <= MAX_SPLITS && splits * 2 <= groups && blocks * splits < 4 * card.multiprocessors) splits *= 2;
  return splits;
}

template <typename In, int MTO, int NTI, int OFF8, int R, int KYS, int WWARPS>
int launch_weight_tile(const In* x, const In* dy, float* partial, const Shape& s, const Card& card, cudaStream_t stream,
                       int* splits) {
  using U = Unit<In>;
  constexpr int COLSX = ((8 * NTI + 15) / 16) * 16, TARGET = U::PARTS == 1 ? 112 : 56;
  auto bytes = [&](int images, int band, int buffers) {
    return sizeof(typename U::T) * U::PARTS * buffers *
               (((size_t)images * staged_rows(s, band) + 1) * (COLSX + 8) +
                ((size_t)images * band + 1) * (16 * MTO + 8)) +
           sizeof(float) * WWARPS * SCRATCH;
  };
  const int images = s.H <= TARGET ? TARGET / s.H : 1;
  WeightTile t;
  if (!fit_tile(s, TARGET, images < s.N ? images : s.N, card.shared_bytes, bytes, &t.images, &t.band, &t.buffers))
    return DOES_NOT_FIT;
  t.column_tiles = (s.W + 16 * MTO - 1) / (16 * MTO);
  t.ky_groups = (s.K + WWARPS * KYS - 1) / (WWARPS * KYS);
  t.splits = *splits = weight_splits(t.ky_groups * s.C, (s.N + t.images - 1) / t.images, card);
  return launch(tensor_core_weight_gradient<In, MTO, NTI, OFF8, R, KYS, WWARPS>, t.ky_groups * s.C * t.splits,
                WWARPS * 32, bytes(t.images, t.band, t.buffers), stream, x, dy, partial, s, t);
}

template <typename In, int R>
int tensor_core_weight_gradient_width(const In* x, const In* dy, float* partial, const Shape& s, const Card& card,
                                      cudaStream_t stream, int* splits) {
  constexpr int WW = R == 1 || sizeof(In) == 4 ? 8 : 16, O = R <= 2 ? 2 : 4;
  auto run = [&](auto launch_it) { return launch_it(x, dy, partial, s, card, stream, splits); };
  if (s.W <= 8) return run(launch_weight_tile<In, 1, 1, 0, R, 2, WW>);
  if (s.W <= 16) return run(launch_weight_tile<In, 1, 2, 0, R, 2, WW>);
  if (s.W <= 32) return run(launch_weight_tile<In, 2, 4, 0, R, 2, WW>);
  if (s.W <= 56) return run(launch_weight_tile<In, 4, 7, 0, R, 1, WW>);
  return run(launch_weight_tile<In, 2, 4 + 2 * O, O, R, 1, WW>);
}

// `splits` is set to the number of shares in `partial`.
template <typename In>
int launch_tensor_core_weight_gradient(const In* x, const In* dy, float* partial, const Shape& s, const Card& card,
                                       cudaStream_t stream, int* splits) {
  if (s.K <= 17) return tensor_core_weight_gradient_width<In, 1>(x, dy, partial, s, card, stream, splits);
  if (s.K <= 33) return tensor_core_weight_gradient_width<In, 2>(x, dy, partial, s, card, stream, splits);
  return tensor_core_weight_gradient_width<In, 4>(x, dy, partial, s, card, stream, splits);
}

}  // namespace large_kernel::cuda
