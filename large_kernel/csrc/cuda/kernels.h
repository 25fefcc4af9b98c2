// Depthwise convolution with large kernels on NVIDIA GPUs, stride 1, K / 2 zeros on each side: the functions that
// operator.cc in this folder, and programs without Paddle through ctypes, call. All pointers are to device memory. Work
// is put on `stream` (a cudaStream_t) and not waited for. Results are the same from run to run.
//
// A function returns 0, or a status for `large_kernel_cuda_message`.
#pragma once
#include <cstdint>

extern "C" {

enum LargeKernelType { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };
// Automatic, or for tests and measurements one of the two ways to compute.
enum LargeKernelPath { kAutomatic = 0, kTensorCores = 1, kDirect = 2 };

// x, y and their gradients are [batch][channels][height][width] of `type`, weights [channels][kernel][kernel].
// `kernel` is odd and 3 to 63; `device` is the CUDA device of the tensors, or -1 for the present one.
struct LargeKernelConv {
  int batch, channels, height, width, kernel, type, path, device;
};

// y = conv(x, w) + bias, then ReLU if `relu`; `bias` [channels] may be null. Weights and bias are of any type; weights
// are rounded to that of x.
int large_kernel_cuda_forward(const LargeKernelConv* conv, const void* x, const void* w, int w_type, const void* bias,
                              int bias_type, void* y, int relu, void* stream);

// dx from dy.
int large_kernel_cuda_input_gradient(const LargeKernelConv* conv, const void* dy, const void* w, int w_type, void* dx,
                                     void* stream);

// dw, of any type, from x and dy. `workspace` holds as many floats as the next function says.
int large_kernel_cuda_weight_gradient(const LargeKernelConv* conv, const void* x, const void* dy, void* dw,
                                      int dw_type, float* workspace, void* stream);
std::int64_t large_kernel_cuda_workspace(const LargeKernelConv* conv);

// dbias [channels], of any type, from dy.
int large_kernel_cuda_bias_gradient(const LargeKernelConv* conv, const void* dy, void* dbias, int dbias_type,
                                    void* stream);

// What a status means.
const char* large_kernel_cuda_message(int status);

}  // extern "C"
