// Copies a part of the planes of a channel to shared memory.
#pragma once
#include "types.cuh"

namespace large_kernel::cuda {

// Rows [r0, r1) x columns [x0, x0 + COLS) of channel c of `images` planes from n0 on, as rows of LD elements; zeros beyond
// the columns of the plane and beyond the last image. V columns at a time: W, x0 and COLS are multiples of V.
template <typename In, typename T, int PARTS, int COLS, int LD, int V>
__device__ __forceinline__ void stage_vectors(const In* x, T* rows, int part_stride, const Shape& s, int c, int n0,
                                              int images, int r0, int r1, int x0) {
  constexpr int UNITS = COLS / V, BYTES = V * sizeof(In), BATCH = 4;
  const int count = r1 - r0, total = images * count * UNITS;
  const float inverse = 1.f / count;
  auto source = [&](int u, int& row, int& col, bool& inside) {
    row = u / UNITS;
    col = (u - row * UNITS) * V;
    const int i = (int)((row + .5f) * inverse), r = r0 + row - i * count, xc = x0 + col;
    inside = xc >= 0 && xc < s.W && n0 + i < s.N;
    return inside ? x + ((size_t)(n0 + i) * s.C + c) * s.H * s.W + (size_t)r * s.W + xc : x;
  };
  if constexpr (PARTS == 1 && BYTES >= 4) {
    for (int u = threadIdx.x; u < total; u += blockDim.x) {
      int row, col;
      bool inside;
      const In* from = source(u, row, col, inside);
      copy_async<BYTES>(shared_address(rows + row * LD + col), from, inside);
    }
  } else {
    for (int u0 = threadIdx.x; u0 < total; u0 += BATCH * blockDim.x) {
      alignas(16) In v[BATCH][V];
      int row[BATCH], col[BATCH];
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        const int u = u0 + k * blockDim.x;
        bool inside = false;
        const In* from = x;
        row[k] = 0;
        col[k] = 0;
        if (u < total) from = source(u, row[k], col[k], inside);
        if constexpr (BYTES == 16)
          *(uint4*)v[k] = inside ? __ldg((const uint4*)from) : make_uint4(0, 0, 0, 0);
        else if constexpr (BYTES == 8)
          *(uint2*)v[k] = inside ? __ldg((const uint2*)from) : make_uint2(0, 0);
        else if constexpr (BYTES == 4)
          *(uint32_t*)v[k] = inside ? __ldg((const uint32_t*)from) : 0u;
        else
          *(uint16_t*)v[k] = inside ? __ldg((const uint16_t*)from) : (uint16_t)0;
      }
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        if (u0 + k * (int)blockDim.x >= total) break;
        alignas(16) T out[PARTS][V];
#pragma unroll
        for (int e = 0; e < V; e++) {
          T parts[PARTS];
          split<In, T, PARTS>(v[k][e], parts);
#pragma unroll
          for (int a = 0; a < PARTS; a++) out[a][e] = parts[a];
        }
#pragma unroll
        for (int a = 0; a < PARTS; a++) {
          T* to = rows + a * part_stride + row[k] * LD + col[k];
          if constexpr (V == 8)
            *(uint4*)to = *(uint4*)out[a];
          else if constexpr (V == 4)
            *(uint2*)to = *(uint2*)out[a];
          else if constexpr (V == 2)
            *(uint32_t*)to = *(uint32_t*)out[a];
          else
            *to = out[a][0];
        }
      }
    }
  }
}

// The same for any width, x0 and COLS multiples of 8: with the widest vectors that the width allows. 16-bit elements are
// copied asynchronously unless the width is odd.
template <typename In, typename T, int PARTS, int COLS, int LD>
__device__ __forceinline__ void stage(const In* x, T* rows, int part_stride, const Shape& s, int c, int n0, int images,
                                      int r0, int r1, int x0) {
  constexpr int V = 16 / sizeof(In);
  if (s.W % V == 0)
    stage_vectors<In, T, PARTS, COLS, LD, V>(x, rows, part_stride, s, c, n0, images, r0, r1, x0);
  else if (s.W % 4 == 0)
    stage_vectors<In, T, PARTS, COLS, LD, 4>(x, rows, part_stride, s, c, n0, images, r0, r1, x0);
  else if (s.W % 2 == 0)
    stage_vectors<In, T, PARTS, COLS, LD, 2>(x, rows, part_stride, s, c, n0, images, r0, r1, x0);
  else
    stage_vectors<In, T, PARTS, COLS, LD, 1>(x, rows, part_stride, s, c, n0, images, r0, r1, x0);
}

// The same as float32, in rows of `ld` elements of which `columns` are written, any x0 and width: for kernels that do
// not use matrix units.
template <typename In>
__device__ __forceinline__ void stage_floats(const In* x, float* rows, int ld, int columns, const Shape& s, int c,
                                             int n0, int images, int r0, int r1, int x0) {
  const int count = r1 - r0, total = images * count * columns;
  for (int u = threadIdx.x; u < total; u += blockDim.x) {
    const int row = u / columns, col = u - row * columns, i = row / count, r = r0 + row - i * count, xc = x0 + col;
    const bool inside = xc >= 0 && xc < s.W && n0 + i < s.N;
    rows[row * ld + col] =
        inside ? to_float(x[((size_t)(n0 + i) * s.C + c) * s.H * s.W + (size_t)r * s.W + xc]) : 0.f;
  }
}

}  // namespace large_kernel::cuda
