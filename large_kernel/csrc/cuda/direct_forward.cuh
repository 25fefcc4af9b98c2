// Forward pass and input gradient with plain multiply-adds: for cards below compute capability 8.0, for small float32
// maps, and where the tiles of tensor_core_forward.cuh do not fit into shared memory.
//
//     a thread:  4 rows x 4 columns of sums in registers
//     for each row of x that it needs, for each 4 taps along it:
//         8 pixels, of which 4 are new (one load of 16 bytes)
//         4 kernel rows x 4 taps (4 such loads, the same for all lanes)  ->  64 multiply-adds
//
// Threads with the same rows are neighbours, so that rows outside the map are skipped by whole warps.
#pragma once
#include "tensor_core_forward.cuh"

namespace large_kernel::cuda {

constexpr int DIRECT_THREADS = 256;
constexpr int DIRECT_BYTES = 48 * 1024;  // every card allows this much

__host__ __device__ constexpr int round4(int n) { return (n + 3) & ~3; }

struct DirectTile {
  int images, band, width, column_tiles, shares;  // width: a multiple of 4
};

template <typename In>
__global__ void __launch_bounds__(DIRECT_THREADS) direct_forward(Forward<In> f, DirectTile t) {
  const Shape& s = f.s;
  const int K = s.K, p = K / 2, K4 = round4(K), LD = t.width + K4;
  const int bands = (s.H + t.band - 1) / t.band, groups = (s.N + t.images - 1) / t.images;
  int job = blockIdx.x;
  const int x0 = job % t.column_tiles * t.width;
  job /= t.column_tiles;
  const int y0 = job % bands * t.band;
  job /= bands;
  const int share = job % t.shares, c = job / t.shares;
  const int y1 = min(s.H, y0 + t.band), r0 = max(0, y0 - p), r1 = min(s.H, y1 + p), SR = r1 - r0;
  float* ws = (float*)dynamic_shared_memory();  // K rows of K4 taps, 3 rows of zeros on either side
  float* xs = ws + (K + 6) * K4;                // column j of a row: pixel x0 - p + j
  for (int u = threadIdx.x; u < (K + 6) * K4; u += blockDim.x) {
    const int ky = u / K4 - 3, kx = u % K4;
    const bool inside = ky >= 0 && ky < K && kx < K;
    ws[u] = inside ? to_float(from_float<In>(f.w[f.tap(c, ky * K + kx)])) : 0.f;
  }
  const int row_tiles = (y1 - y0 + 3) / 4, columns = t.width / 4, items = row_tiles * t.images * columns;
  const float shift = f.shift(c);
  for (int group = (int)((long long)groups * share / t.shares);
       group < (int)((long long)groups * (share + 1) / t.shares); group++) {
    const int n0 = group * t.images;
    __syncthreads();
    stage_floats(f.x, xs, LD, LD, s, c, n0, t.images, r0, r1, x0 - p);
    __syncthreads();
    bool bad = false;
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      const int xt = item % columns, i = item / columns % t.images, y = y0 + item / columns / t.images * 4;
      float acc[4][4] = {};
      const int first = max(0, p - y), last = min(K + 2, s.H - 1 - y + p);  // rows of x from y - p on
      for (int d = first; d <= last; d++) {
        if (y + d - p >= r1) break;
        const float* row = xs + (i * SR + y + d - p - r0) * LD + 4 * xt;
        const float* taps = ws + (d + 3) * K4;
        float4 left = *(const float4*)row;
        for (int kx = 0; kx < K4; kx += 4) {
          const float4 right = *(const float4*)(row + kx + 4);
          const float v[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
#pragma unroll
          for (int a = 0; a < 4; a++) {  // output row y + a: kernel row d - a
            const float4 w4 = *(const float4*)(taps - a * K4 + kx);
            const float w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
              for (int b = 0; b < 4; b++) acc[a][b] += v[k + b] * w[k];
          }
          left = right;
        }
      }
      if (n0 + i >= s.N) continue;
      In* out = f.y + (((size_t)(n0 + i) * s.C + c) * s.H + y) * s.W + x0 + 4 * xt;
#pragma unroll
      for (int a = 0; a < 4; a++)
#pragma unroll
        for (int b = 0; b < 4; b++)
          if (y + a < y1 && x0 + 4 * xt + b < s.W) {
            const float v = f.activate(acc[a][b] + shift);
            bad |= !isfinite(v);
            out[(size_t)a * s.W + b] = from_float<In>(v);
          }
    }
    if (__syncthreads_or(bad)) redo_outputs(f, c, n0, n0 + t.images, y0, y1, x0, min(s.W, x0 + t.width));
  }
}

template <typename In>
int launch_direct_forward(const Forward<In>& f, const Card& card, cudaStream_t stream) {
  const Shape& s = f.s;
  DirectTile t = {};
  const int K4 = round4(s.K);
  int LD = 0;
  auto rows_fit = [&](int images, int band) {
    return sizeof(float) * ((long long)images * staged_rows(s, band) * LD + (s.K + 6) * K4) <= DIRECT_BYTES;
  };
  for (t.width = round4(s.W) < 64 ? round4(s.W) : 64;; t.width = round4(t.width / 2)) {  // narrower until 16 rows fit
    LD = t.width + K4;
    t.band = s.H < 64 ? s.H : 64;
    while (t.band > 16 && !rows_fit(1, t.band)) t.band--;
    if (rows_fit(1, t.band)) break;
  }
  // As many planes as give every thread an item.
  const int items = (t.band + 3) / 4 * (t.width / 4);
  for (t.images = 1; t.images < s.N && t.images * items < DIRECT_THREADS && rows_fit(t.images + 1, t.band);) t.images++;
  t.column_tiles = (s.W + t.width - 1) / t.width;
  const int jobs = t.column_tiles * ((s.H + t.band - 1) / t.band) * s.C, groups = (s.N + t.images - 1) / t.images;
  t.shares = (card.multiprocessors * 16 + jobs - 1) / jobs;
  if (t.shares > groups) t.shares = groups;
  const size_t bytes = sizeof(float) * ((size_t)(s.K + 6) * K4 + (size_t)t.images * staged_rows(s, t.band) * LD);
  return launch(direct_forward<In>, jobs * t.shares, DIRECT_THREADS, bytes, stream, f, t);
}

}  // namespace large_kernel::cuda
