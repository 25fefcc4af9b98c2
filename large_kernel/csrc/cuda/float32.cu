#include "passes.cuh"

namespace large_kernel::cuda {
LARGE_KERNEL_INSTANTIATE(float)
}
