"""The depthwise convolution on NVIDIA GPUs: builds its operator on first use, and runs it.

The kernels are in csrc/cuda; docs/large_kernel.md describes them.
"""
import functools
import hashlib
import platform
import subprocess
import sys
import warnings

import numpy as np

from large_kernel import build, nvcc
from large_kernel.operators import run_cuda, run_cuda_gradients

import paddle  # isort: skip

MIN_KERNEL, MAX_KERNEL = 5, 63  # 3x3 and 1x1 stay with Paddle
MIN_CAPABILITY = (7, 0)


def _binding_command(home, unit):
    """Command that compiles the binding, which includes Paddle's headers and with them CUDA's."""
    include = paddle.sysconfig.get_include()
    # CUDA's headers take __NVCC__ for device code.
    return [str(home), '-x', 'c++', '-O2', '-std=c++17', '-w', '-Xcompiler', '-fPIC,-U__NVCC__',
            *nvcc.host_options(home), '-D_GLIBCXX_USE_CXX11_ABI=1', '-DPADDLE_WITH_CUDA',
            '-DPADDLE_WITH_CUSTOM_KERNEL', f'-I{include}', f'-I{include}/third_party',
            '-c', str(nvcc.SOURCES / 'operator.cc'), '-o', str(unit)]


def _link_options():
    libs = paddle.sysconfig.get_lib()
    core = f'{paddle.sysconfig.get_include()}/../base'
    return [f'-L{core}', f'-L{libs}', '-Xlinker', f'-rpath={core}:{libs}', '-Xlinker', '--no-as-needed',
            '-l:libpaddle.so']


def library_path(capability):
    """Path of the operator's shared library for a compute capability such as (8, 0); it is built if necessary.

    Raises:
        BuildError: it cannot be built.
    """
    if platform.system() != 'Linux':
        raise build.BuildError(f'the CUDA operator is built on Linux only; this is {platform.system()}')
    try:
        home = nvcc.find()
        parts = [paddle.__version__, paddle.version.commit, nvcc.version(home), str(capability),
                 *_binding_command(home, ''), *nvcc.compile_command(home, '', '', capability)]
        parts += [path.read_text() for path in sorted(nvcc.SOURCES.iterdir())]
        key = hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]

        def make(folder, library):
            print(f'large_kernel: compiling the CUDA operator with {home}, about five minutes of processor time',
                  file=sys.stderr, flush=True)
            binding = f'{folder}/operator.o'
            nvcc.run(_binding_command(home, binding))
            nvcc.link(home, [binding, *nvcc.compile_units(home, folder, capability)], library, _link_options())
        return build.cached(f'large_kernel_cuda_{key}.so', make, 'the CUDA operator once for GPUs of compute '
                            'capability {}.{} with {}'.format(*capability, home))
    except (nvcc.NvccError, OSError, subprocess.SubprocessError) as error:
        raise build.BuildError(' '.join(str(error).split())) from None


def count():
    """How many NVIDIA GPUs Paddle can use."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


@functools.lru_cache(maxsize=None)
def reason_unavailable(device=0):
    """None if the operator is ready for a GPU (it is built if necessary), else the reason in one line."""
    if not paddle.is_compiled_with_cuda():
        return 'this Paddle is built without CUDA'
    if count() <= device:
        return 'Paddle sees no GPU'
    capability = tuple(paddle.device.cuda.get_device_capability(device))
    if capability < MIN_CAPABILITY:
        return 'the GPU has compute capability {}.{}; the kernels need 7.0'.format(*capability)
    try:
        build.register(library_path(capability))
    except build.BuildError as error:
        return str(error)
    return _self_check(paddle.CUDAPlace(device))


def _self_check(place):
    """None if the operator computes on this GPU what it should, else the reason.

    A driver older than the CUDA toolkit, for example, shows only when a kernel runs.
    """
    try:
        for dtype, tolerance in (('float32', 2e-3), ('float16', 1e-2)):
            error = _difference(dtype, place)
            if not error <= tolerance:
                return f"its {dtype} results are wrong on this GPU (relative error {error:.1e})"
    except (RuntimeError, OSError, ValueError) as error:
        return f'it does not run on this GPU: {build._last_line(str(error))}'
    return None


@paddle.no_grad()
def _difference(dtype, place):
    """Largest relative difference of result and gradients from sums of shifted maps in float32.

    Without autograd: the first use may be inside recomputation, whose hooks would see its tensors.
    """
    shapes, kernel = ((2, 3, 33, 12), (3, 1, 9, 9), (2, 3, 33, 12)), 9
    x, weight, dy = (paddle.to_tensor(np.sin(np.arange(np.prod(shape)) * step).astype('float32').reshape(shape),
                                      place=place).astype(dtype) for shape, step in zip(shapes, (0.7, 1.3, 0.3)))

    def shifted(t):  # [2, 3, 81, 33 * 12]: the map as each tap sees it
        return paddle.nn.functional.unfold(t, kernel, paddings=kernel // 2).reshape([2, 3, kernel**2, -1])

    with paddle.amp.auto_cast(enable=False):
        parameters = weight.astype('float32')
        found = [run_cuda(x, parameters, None), *run_cuda_gradients(x, parameters, dy)]
        x, weight, dy = (t.astype('float32') for t in (x, weight, dy))
        taps, centre = weight.reshape([1, 3, kernel**2, 1]), kernel**2 // 2
        want = [(shifted(x) * taps).sum(2), (shifted(dy) * taps.flip([2])).sum(2),
                (shifted(x) * shifted(dy)[:, :, centre:centre + 1]).sum(3).sum(0)]
        return max(float((a.astype('float32').reshape(b.shape) - b).abs().max() / b.abs().max())
                   for a, b in zip(found, want))


def on_gpu(x):
    """Whether a tensor is on an NVIDIA GPU."""
    return x.place.is_gpu_place()


_warned = False


def takes(x, weight, stride, required):
    """Whether the operator computes this convolution: on a GPU, in dygraph, at stride 1 and from 5x5 on.

    Warns once if it cannot be built for a GPU.

    Args:
        required: raise instead of warning.
    Raises:
        RuntimeError: it is required and not available.
    """
    global _warned
    if not paddle.in_dynamic_mode() or not on_gpu(x):
        return False
    if stride != 1 or not MIN_KERNEL <= weight.shape[-1] <= MAX_KERNEL:
        return False
    reason = reason_unavailable(max(0, x.place.gpu_device_id()))
    if reason is None:
        return True
    if required:
        raise RuntimeError(f'LARGE_KERNEL_CONV_IMPL=custom: {reason}')
    if not _warned:
        _warned = True
        warnings.warn('the CUDA operator for depthwise convolutions is not available; large kernels are many times '
                      f"slower with paddle.fft or Paddle's own convolution: {reason}", RuntimeWarning, stacklevel=4)
    return False


def autocast_dtype():
    """Paddle's name of the dtype of mixed precision, or None outside of `paddle.amp.auto_cast`."""
    tracer = paddle.base.framework._dygraph_tracer()
    if tracer is None or tracer._amp_level == paddle.base.core.AmpLevel.O0:
        return None
    return tracer._amp_dtype


def conv_cuda(x, weight, bias, stride):
    """The CUDA operator; same arguments and result as `depthwise_conv2d`.

    In mixed precision it computes and returns the half-precision dtype, for which Paddle has no rule of its own
    here; gradients of the weight and the bias have their dtypes.
    """
    dtype = autocast_dtype()
    if dtype and str(x.dtype).split('.')[-1].lower() != dtype:
        x = x.astype(dtype)
    return run_cuda(x, weight, bias)
