// Weight gradient with plain multiply-adds: for cards below compute capability 8.0, and where the tiles of
// tensor_core_weight_gradient.cuh do not fit into shared memory.
//
//     a thread:  4 x 4 taps in registers, for every `slots`-th row of dy of the block's share of the images
//     for each 4 pixels of the row:  4 of dy, and for each of 4 rows of x 8, of which 4 are new  ->  64 multiply-adds
//
// Then the slots of a tap are added in order.
#pragma once
#include "direct_forward.cuh"
#include "tensor_core_weight_gradient.cuh"

namespace large_kernel::cuda {

template <typename In>
__global__ void __launch_bounds__(DIRECT_THREADS)
    direct_weight_gradient(const In* x, const In* dy, float* partial, Shape s, DirectTile t) {
  const int K = s.K, p = K / 2, K4 = round4(K), LD = t.width + K4;
  const int bands = (s.H + t.band - 1) / t.band, groups = (s.N + t.images - 1) / t.images;
  const int share = blockIdx.x % t.shares, c = blockIdx.x / t.shares;
  const int side = K4 / 4, tiles = side * side, slots = DIRECT_THREADS / tiles;
  const int tile = threadIdx.x % tiles, slot = threadIdx.x / tiles, ky0 = tile / side * 4, kx0 = tile % side * 4;
  float* memory = (float*)dynamic_shared_memory();
  float acc[4][4] = {};
  const int first = (int)((long long)groups * share / t.shares), last = (int)((long long)groups * (share + 1) / t.shares);
  const int per = bands * t.column_tiles;
  for (int it = first * per; it < last * per; it++) {
    const int x0 = it % t.column_tiles * t.width, y0 = it / t.column_tiles % bands * t.band, n0 = it / per * t.images;
    const int y1 = min(s.H, y0 + t.band), r0 = max(0, y0 - p), r1 = min(s.H, y1 + p), rows = y1 - y0;
    float* ys = memory;                            // rows of dy
    float* xs = memory + t.images * t.band * t.width;  // column j of a row: pixel x0 - p + j
    __syncthreads();
    stage_floats(dy, ys, t.width, t.width, s, c, n0, t.images, y0, y1, x0);
    stage_floats(x, xs, LD, LD, s, c, n0, t.images, r0, r1, x0 - p);
    __syncthreads();
    if (slot >= slots) continue;
    for (int line = slot; line < t.images * rows; line += slots) {
      const int i = line / rows, r = y0 + line % rows + ky0 - p;  // row of x for the thread's first row of taps
      const float* d = ys + line * t.width;
      const float* v = xs + (i * (r1 - r0) + r - r0) * LD + kx0;
      bool inside[4];
      float4 left[4];
#pragma unroll
      for (int a = 0; a < 4; a++) {
        inside[a] = r + a >= r0 && r + a < r1;
        left[a] = inside[a] ? *(const float4*)(v + a * LD) : make_float4(0.f, 0.f, 0.f, 0.f);
      }
      for (int col = 0; col < t.width; col += 4) {
        const float4 d4 = *(const float4*)(d + col);
        const float dv[4] = {d4.x, d4.y, d4.z, d4.w};
#pragma unroll
        for (int a = 0; a < 4; a++) {
          if (!inside[a]) continue;
          const float4 right = *(const float4*)(v + a * LD + col + 4);
          const float xv[8] = {left[a].x, left[a].y, left[a].z, left[a].w, right.x, right.y, right.z, right.w};
#pragma unroll
          for (int b = 0; b < 4; b++)
#pragma unroll
            for (int k = 0; k < 4; k++) acc[a][b] += dv[k] * xv[b + k];
          left[a] = right;
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int a = 0; a < 4; a++)
#pragma unroll
    for (int b = 0; b < 4; b++) memory[(a * 4 + b) * DIRECT_THREADS + threadIdx.x] = acc[a][b];
  __syncthreads();
  for (int u = threadIdx.x; u < K * K; u += blockDim.x) {
    const int ky = u / K, kx = u % K;
    const float* sums = memory + (ky % 4 * 4 + kx % 4) * DIRECT_THREADS + ky / 4 * side + kx / 4;
    float sum = 0.f;
    for (int k = 0; k < slots; k++) sum += sums[k * tiles];
    partial[((size_t)share * s.C + c) * K * K + u] = sum;
  }
}

// `splits` is set to the number of shares in `partial`.
template <typename In>
int launch_direct_weight_gradient(const In* x, const In* dy, float* partial, const Shape& s, const Card& card,
                                  cudaStream_t stream, int* splits) {
  DirectTile t = {};
  const int K4 = round4(s.K);
  auto bytes = [&](int images, int band) {
    return sizeof(float) * images * ((size_t)staged_rows(s, band) * (t.width + K4) + (size_t)band * t.width);
  };
  for (t.width = round4(s.W) < 64 ? round4(s.W) : 64;; t.width = round4(t.width / 2)) {  // narrower until 16 rows fit
    t.band = s.H < 64 ? s.H : 64;
    while (t.band > 16 && bytes(1, t.band) > DIRECT_BYTES) t.band--;
    if (bytes(1, t.band) <= DIRECT_BYTES) break;
  }
  const int slots = DIRECT_THREADS / (K4 / 4 * (K4 / 4));
  for (t.images = 1; t.images < s.N && t.images * t.band < slots && bytes(t.images + 1, t.band) <= DIRECT_BYTES;)
    t.images++;
  t.column_tiles = (s.W + t.width - 1) / t.width;
  t.shares = *splits = weight_splits(s.C, (s.N + t.images - 1) / t.images, card);
  const size_t sums = sizeof(float) * 16 * DIRECT_THREADS, staged = bytes(t.images, t.band);
  return launch(direct_weight_gradient<In>, s.C * t.shares, DIRECT_THREADS, staged > sums ? staged : sums, stream, x,
                dy, partial, s, t);
}

}  // namespace large_kernel::cuda
