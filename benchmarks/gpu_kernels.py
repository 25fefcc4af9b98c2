"""Checks and times the CUDA kernels of `large_kernel` on a GPU, beside torch; Paddle is not needed.

    python benchmarks/gpu_kernels.py                              # check, then times of RepLKNet-31B's layers
    python benchmarks/gpu_kernels.py check -types=float32
    python benchmarks/gpu_kernels.py time -size=384 -batch=32 -types=float16,float32 -paths=auto,direct -output=gpu.json

It needs torch with CUDA, and an nvcc for the first start, which compiles the kernels for the present card into
-library. Times are medians in milliseconds of forward pass, input gradient and weight gradient. `-paths` names the
kernels: auto (what Paddle's operator takes), tensor (tensor cores) or direct (multiply-adds). torch is timed as NCHW
and, where half precision is timed, as channels_last, which is cuDNN's.
"""
import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'large_kernel'))  # without the package, which imports Paddle
import nvcc  # noqa: E402

TYPES = ('float16', 'bfloat16', 'float32')  # LargeKernelType in kernels.h
PATHS = ('auto', 'tensor', 'direct')  # LargeKernelPath
PASSES = ('forward', 'input gradient', 'weight gradient')
LAYERS = {'large': ((128, 4, 31), (256, 8, 29), (512, 16, 27), (1024, 32, 13)),  # channels, image / map size, kernel
          'small': ((128, 4, 5), (256, 8, 5), (512, 16, 5), (1024, 32, 5))}
CHECKED = (  # N, C, H, W, K
    (2, 8, 56, 56, 31), (3, 5, 28, 28, 29), (5, 7, 14, 14, 27), (33, 3, 7, 7, 13), (1, 4, 96, 96, 31),
    (2, 3, 48, 48, 29), (2, 3, 24, 24, 27), (3, 3, 12, 12, 13), (2, 3, 57, 61, 31), (1, 2, 130, 67, 31),
    (2, 3, 5, 9, 31), (1, 2, 300, 40, 21), (2, 2, 33, 17, 3), (4, 3, 56, 56, 5), (2, 2, 16, 64, 33), (1, 1, 1, 1, 31),
    (2, 3, 80, 80, 27), (1, 2, 40, 200, 31), (6, 2, 10, 20, 17), (2, 2, 9, 31, 19), (2, 2, 56, 56, 51),
    (1, 2, 70, 90, 63), (3, 2, 20, 20, 39), (2, 1, 7, 7, 49))
# Errors relative to the result's norm: of the results' rounding, and of float32 sums.
TOLERANCES = {'float16': 1e-3, 'bfloat16': 8e-3, 'float32': 3e-6}


class Conv(ctypes.Structure):
    """LargeKernelConv of kernels.h."""
    _fields_ = [(name, ctypes.c_int) for name in
                ('batch', 'channels', 'height', 'width', 'kernel', 'type', 'path', 'device')]


class Kernels:
    """The functions of kernels.h in a shared library, on addresses of memory.

    Args:
        library: path.
    Raises:
        RuntimeError: a call failed.
    """

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._library.large_kernel_cuda_workspace.restype = ctypes.c_int64
        self._library.large_kernel_cuda_message.restype = ctypes.c_char_p

    def _call(self, name, conv, *arguments):
        values = [ctypes.c_void_p(a[0]) if isinstance(a, tuple) else ctypes.c_int(a) for a in arguments]
        status = getattr(self._library, f'large_kernel_cuda_{name}')(ctypes.byref(conv), *values)
        if status:
            raise RuntimeError(f'{name}: {self._library.large_kernel_cuda_message(status).decode()}')

    def workspace(self, conv):
        """Floats that the weight gradient needs."""
        return self._library.large_kernel_cuda_workspace(ctypes.byref(conv))

    def forward(self, conv, x, weight, weight_type, bias, bias_type, y, relu=0, stream=0):
        self._call('forward', conv, (x,), (weight,), weight_type, (bias,), bias_type, (y,), relu, (stream,))

    def input_gradient(self, conv, dy, weight, weight_type, dx, stream=0):
        self._call('input_gradient', conv, (dy,), (weight,), weight_type, (dx,), (stream,))

    def weight_gradient(self, conv, x, dy, dweight, dweight_type, workspace, stream=0):
        self._call('weight_gradient', conv, (x,), (dy,), (dweight,), dweight_type, (workspace,), (stream,))

    def bias_gradient(self, conv, dy, dbias, dbias_type, stream=0):
        self._call('bias_gradient', conv, (dy,), (dbias,), dbias_type, (stream,))


class TorchKernels:
    """`Kernels` on torch's tensors on the GPU: x [N, C, H, W], weight [C, 1, K, K]."""

    def __init__(self, library):
        self._kernels, self._workspaces = Kernels(library), {}

    def _conv(self, x, kernel, path):
        return Conv(*x.shape, kernel, _type(x), PATHS.index(path), x.device.index)

    def forward(self, x, weight, bias=None, relu=False, path='auto'):
        import torch
        y = torch.empty_like(x)
        self._kernels.forward(self._conv(x, weight.shape[-1], path), x.data_ptr(), weight.data_ptr(), _type(weight),
                              bias.data_ptr() if bias is not None else None, 2 if bias is None else _type(bias),
                              y.data_ptr(), int(relu), _stream())
        return y

    def input_gradient(self, dy, weight, path='auto'):
        import torch
        dx = torch.empty_like(dy)
        self._kernels.input_gradient(self._conv(dy, weight.shape[-1], path), dy.data_ptr(), weight.data_ptr(),
                                     _type(weight), dx.data_ptr(), _stream())
        return dx

    def weight_gradient(self, x, dy, kernel, path='auto'):
        import torch
        conv = self._conv(x, kernel, path)
        size = self._kernels.workspace(conv)
        if size not in self._workspaces:
            self._workspaces[size] = torch.empty(size, device=x.device)
        dweight = torch.empty(x.shape[1], 1, kernel, kernel, dtype=torch.float32, device=x.device)
        self._kernels.weight_gradient(conv, x.data_ptr(), dy.data_ptr(), dweight.data_ptr(), _type(dweight),
                                      self._workspaces[size].data_ptr(), _stream())
        return dweight

    def bias_gradient(self, dy):
        import torch
        dbias = torch.empty(dy.shape[1], device=dy.device)
        self._kernels.bias_gradient(self._conv(dy, 3, 'auto'), dy.data_ptr(), dbias.data_ptr(), 2, _stream())
        return dbias


def _type(tensor):
    return TYPES.index(str(tensor.dtype).split('.')[-1])


def _stream():
    import torch
    return torch.cuda.current_stream().cuda_stream


def _relative(found, want):
    return float((found.double() - want).norm() / want.norm().clamp_min(1e-300))


def _reference(x, weight, bias, dy):
    """Result and gradients of x, weight and bias in float64."""
    import torch
    tensors = [t.double().requires_grad_() for t in (x, weight, bias)]
    with torch.backends.cudnn.flags(enabled=False):
        y = torch.nn.functional.conv2d(*tensors, padding=weight.shape[-1] // 2, groups=x.shape[1])
        y.backward(dy.double())
    return [y.detach(), *(t.grad for t in tensors)]


def check(kernels, types, paths):
    """Compares all passes with float64; returns how many comparisons failed."""
    import torch
    bad = 0
    for dtype in types:
        kind = getattr(torch, dtype)
        for path in paths:
            worst = [0.0] * 4
            for n, c, h, w, k in CHECKED:
                x, dy = (torch.randn(n, c, h, w, device='cuda').to(kind) for _ in range(2))
                weight, bias = torch.randn(c, 1, k, k, device='cuda').to(kind), torch.randn(c, device='cuda').to(kind)
                want = _reference(x, weight, bias, dy)
                found = [kernels.forward(x, weight, bias, path=path), kernels.input_gradient(dy, weight, path),
                         kernels.weight_gradient(x, dy, k, path), kernels.bias_gradient(dy)]
                again = kernels.weight_gradient(x, dy, k, path)
                errors = [_relative(a, b) for a, b in zip(found, want)]
                worst = [max(a, b) if b == b else math.inf for a, b in zip(worst, errors)]
                rectified = kernels.forward(x, weight, bias, True, path)
                if not (all(e < TOLERANCES[dtype] for e in errors) and bool((again == found[2]).all())
                        and bool((rectified == found[0].relu()).all())):
                    bad += 1
                    print(f'WRONG {dtype} {path} N{n} C{c} {h}x{w} k{k}: {errors}', flush=True)
            bad += _check_infinity(kernels, kind, path)
            print(f'{dtype} {path}: largest relative errors of y, dx, dweight, dbias: '
                  f'{", ".join(f"{e:.1e}" for e in worst)}', flush=True)
    print('all right' if not bad else f'{bad} wrong')
    return bad


def _check_infinity(kernels, kind, path):
    """Whether an Inf spreads beyond the results whose taps meet it."""
    import torch
    wrong = 0
    for h, w, k in ((20, 24, 9), (9, 7, 13), (16, 70, 31)):
        x, weight = torch.randn(3, 2, h, w, device='cuda').to(kind), torch.rand(2, 1, k, k, device='cuda').to(kind) + 1
        x[1, 1, h // 2, 2] = math.inf
        rows, columns = (torch.arange(size, device='cuda') for size in (h, w))
        meets = ((rows - h // 2).abs() <= k // 2)[:, None] & ((columns - 2).abs() <= k // 2)[None]
        want = torch.zeros(3, 2, h, w, dtype=torch.bool, device='cuda')
        want[1, 1] = meets
        y = kernels.forward(x, weight, path=path)
        if not bool(((y == math.inf) == want).all() and (torch.isfinite(y) != want).all()):
            wrong += 1
            print(f'WRONG {kind} {path} {h}x{w} k{k}: Inf spreads', flush=True)
    return wrong


def _milliseconds(call, repeat, seconds=0.1):
    """Median over rounds of `repeat` calls."""
    import torch
    call()
    torch.cuda.synchronize()
    start, found = time.perf_counter(), []
    while len(found) < 3 or time.perf_counter() - start < seconds:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeat):
            call()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) / repeat)
    return statistics.median(found)


def _own_calls(kernels, x, weight, dy, path):
    return (lambda: kernels.forward(x, weight, path=path), lambda: kernels.input_gradient(dy, weight, path),
            lambda: kernels.weight_gradient(x, dy, weight.shape[-1], path))


def _torch_calls(x, weight, dy, channels_last):
    import torch
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight, dy = (t.contiguous(memory_format=layout) for t in (x, weight, dy))
    pad, groups = weight.shape[-1] // 2, x.shape[1]

    def backward(*wanted):
        return torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [pad] * 2, [1, 1], False, [0, 0],
                                                   groups, [*wanted, False])
    return (lambda: torch.nn.functional.conv2d(x, weight, padding=pad, groups=groups),
            lambda: backward(True, False), lambda: backward(False, True))


def time_layers(kernels, options):
    """Prints and returns the times of every layer, type and system."""
    import torch
    rows = []
    for dtype in options.types:
        for channels, scale, k in (layer for name in options.layers for layer in LAYERS[name]):
            size, kind = options.size // scale, getattr(torch, dtype)
            x, dy = (torch.randn(options.batch, channels, size, size, device='cuda').to(kind) for _ in range(2))
            weight = torch.randn(channels, 1, k, k, device='cuda').to(kind)
            systems = {path: _own_calls(kernels, x, weight, dy, path) for path in options.paths}
            if options.torch:
                systems['torch'] = _torch_calls(x, weight, dy, False)
                if dtype != 'float32':
                    systems['torch channels_last'] = _torch_calls(x, weight, dy, True)
            for system, calls in systems.items():
                times = [_milliseconds(call, 10 if system in PATHS else 1) for call in calls]
                rows.append(dict(system=system, type=dtype, batch=options.batch, channels=channels, size=size, kernel=k,
                                 **dict(zip(PASSES, times))))
                print(f'{dtype:9s}{channels}x{size}x{size} k{k:<3d}{system:20s}'
                      f'{" / ".join(f"{t:.3f}" for t in times)} ms', flush=True)
    return rows


def arguments(argv=None):
    def some_of(choices):
        def parse(text):
            names = text.split(',')
            if not set(names) <= set(choices):
                raise argparse.ArgumentTypeError(f'{text}: expected some of {",".join(choices)}')
            return names
        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('what', nargs='*', metavar='check|time', help='default: both')
    parser.add_argument('-types', type=some_of(TYPES), default=list(TYPES))
    parser.add_argument('-paths', type=some_of(PATHS), default=['auto'])
    parser.add_argument('-layers', type=some_of(LAYERS), default=['large'])
    parser.add_argument('-batch', type=int, default=64)
    parser.add_argument('-size', type=int, default=224, help='of the image, in pixels')
    parser.add_argument('-torch', type=int, choices=(0, 1), default=1, help='1: time torch as well')
    parser.add_argument('-library', default='large_kernel_cuda.so', help='compiled if it does not exist')
    parser.add_argument('-output', help='a JSON file for card, versions and times')
    options = parser.parse_args(argv)
    options.what = options.what or ['check', 'time']
    if not set(options.what) <= {'check', 'time'}:
        parser.error('expected check, time or both')
    if options.batch < 1 or options.size < 32:
        parser.error('-batch is at least 1, -size at least 32')
    return options


def main():
    options = arguments()
    try:
        import torch
    except ImportError:
        print('gpu_kernels.py needs torch: pip install torch', file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print('gpu_kernels.py: torch finds no CUDA device', file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    card = '{} ({}.{})'.format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
    print(f'{card}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}')
    library = Path(options.library).resolve()
    try:
        if not library.exists():
            nvcc.build(library, torch.cuda.get_device_capability())
    except nvcc.NvccError as error:
        print(f'gpu_kernels.py: {error}', file=sys.stderr)
        return 2
    kernels = TorchKernels(library)
    bad = check(kernels, options.types, options.paths) if 'check' in options.what else 0
    if 'time' in options.what:
        rows = time_layers(kernels, options)
        if options.output:
            Path(options.output).write_text(json.dumps(
                {'card': card, 'torch': torch.__version__, 'cuda': torch.version.cuda,
                 'cudnn': torch.backends.cudnn.version(), 'command': sys.argv, 'times': rows}, indent=1) + '\n')
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main())
