// The functions of kernels.h: checks, the device, and the element type.
#include "passes.h"

namespace {

using namespace large_kernel::cuda;

constexpr int UNSUPPORTED = -1;

bool supported(const LargeKernelConv& c) {
  auto type = [](int t) { return t == kFloat16 || t == kBfloat16 || t == kFloat32; };
  return c.batch > 0 && c.channels > 0 && c.height > 0 && c.width > 0 && c.kernel % 2 == 1 && c.kernel >= 3 &&
         c.kernel <= 63 && type(c.type) && c.path >= kAutomatic && c.path <= kDirect;
}

Shape shape(const LargeKernelConv& c) { return {c.batch, c.channels, c.height, c.width, c.kernel}; }

// Calls run(element, card) on the device of the tensors, `element` being a value of their type.
template <typename Run>
int on_device(const LargeKernelConv& conv, Run run) {
  if (!supported(conv)) return UNSUPPORTED;
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  const bool other = conv.device >= 0 && conv.device != before;
  if (status == cudaSuccess && other) status = cudaSetDevice(conv.device);
  Card card;
  if (status == cudaSuccess) status = present_card(&card);
  if (status != cudaSuccess) return status;
  int result;
  if (conv.type == kFloat16)
    result = run(__half(), card);
  else if (conv.type == kBfloat16)
    result = run(__nv_bfloat16(), card);
  else
    result = run(float(), card);
  if (other) cudaSetDevice(before);
  return result;
}

int forward(const LargeKernelConv* conv, const void* x, Parameters w, Parameters bias, void* y, int rotate, int relu,
            void* stream) {
  return on_device(*conv, [&](auto element, const Card& card) {
    using In = decltype(element);
    const Forward<In> f = {(const In*)x, w, bias, (In*)y, shape(*conv), rotate, relu};
    return run_forward(f, conv->path, card, (cudaStream_t)stream);
  });
}

}  // namespace

extern "C" {

int large_kernel_cuda_forward(const LargeKernelConv* conv, const void* x, const void* w, int w_type, const void* bias,
                              int bias_type, void* y, int relu, void* stream) {
  return forward(conv, x, {w, w_type}, {bias, bias_type}, y, 0, relu, stream);
}

int large_kernel_cuda_input_gradient(const LargeKernelConv* conv, const void* dy, const void* w, int w_type, void* dx,
                                     void* stream) {
  return forward(conv, dy, {w, w_type}, {nullptr, kFloat32}, dx, 1, 0, stream);
}

std::int64_t large_kernel_cuda_workspace(const LargeKernelConv* conv) {
  constexpr int MOST_SHARES = 32;  // MAX_SPLITS in tensor_core_weight_gradient.cuh
  int shares = 1;
  while (shares < MOST_SHARES && shares < conv->batch) shares *= 2;
  return (std::int64_t)shares * conv->channels * conv->kernel * conv->kernel;
}

int large_kernel_cuda_weight_gradient(const LargeKernelConv* conv, const void* x, const void* dy, void* dw,
                                      int dw_type, float* workspace, void* stream) {
  return on_device(*conv, [&](auto element, const Card& card) {
    using In = decltype(element);
    return run_weight_gradient((const In*)x, (const In*)dy, {dw, dw_type}, workspace, shape(*conv), conv->path, card,
                               (cudaStream_t)stream);
  });
}

int large_kernel_cuda_bias_gradient(const LargeKernelConv* conv, const void* dy, void* dbias, int dbias_type,
                                    void* stream) {
  return on_device(*conv, [&](auto element, const Card&) {
    using In = decltype(element);
    return run_bias_gradient((const In*)dy, {dbias, dbias_type}, shape(*conv), (cudaStream_t)stream);
  });
}

const char* large_kernel_cuda_message(int status) {
  return status == UNSUPPORTED ? "a shape or type that these kernels do not take"
                               : cudaGetErrorString((cudaError_t)status);
}

}  // extern "C"
