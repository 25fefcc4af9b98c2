"""The CUDA kernels without a GPU: on an emulation of warps (tests/cuda_emulation), and compiled where there is an nvcc.

They are compared with float64. What the emulation does not show: races between threads that no order of them shows,
and speed.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import gpu_kernels  # noqa: E402
from gpu_kernels import Conv, Kernels  # noqa: E402

KERNELS, EMULATION = ROOT / 'large_kernel' / 'csrc' / 'cuda', ROOT / 'tests' / 'cuda_emulation'
COMPILER = os.environ.get('CXX') or shutil.which('g++') or shutil.which('clang++')
H100, A10, T4 = (132, 227 * 1024, 9, 0), (8, 99 * 1024, 8, 6), (4, 64 * 1024, 7, 5)
TYPES = gpu_kernels.TYPES
FLAGS = ['-O0', '-fno-strict-aliasing', '-std=c++17', '-fPIC', '-w']
UNIT = {'float16': 2**-11, 'bfloat16': 2**-8, 'float32': 2**-24}  # of rounding

needs_compiler = pytest.mark.skipif(not COMPILER, reason='no C++ compiler')


def emulated_objects(folder):
    """Compiles the kernels and their emulation; returns the paths of the objects."""
    sources = [*sorted(KERNELS.glob('*.cu')), EMULATION / 'emulation.cc']
    units = [folder / f'{source.stem}.o' for source in sources]
    compilers = [subprocess.Popen([*COMPILER.split(), *FLAGS, f'-I{EMULATION}', f'-I{KERNELS}', '-x', 'c++', '-c',
                                   str(source), '-o', str(unit)]) for source, unit in zip(sources, units)]
    assert not any([compiler.wait() for compiler in compilers])
    return units


@pytest.fixture(scope='module')
def emulated(tmp_path_factory):
    """The kernels compiled by a C++ compiler: function of a card and an order of threads that returns `Kernels`."""
    folder = tmp_path_factory.mktemp('emulated')
    library = folder / 'emulated.so'
    subprocess.run([*COMPILER.split(), '-shared', '-o', str(library), *map(str, emulated_objects(folder))], check=True)
    kernels = Kernels(library)

    def on(card, backwards=False):
        kernels._library.emulate(*card, int(backwards))
        return kernels
    return on


# ---- arrays: half precision is stored as 16 bits

def stored(values, dtype):
    """Float values as an array of the dtype's bits, rounded, with a guard at its end that must not change."""
    values = np.asarray(values, 'float32')
    if dtype == 'bfloat16':
        bits = values.view('uint32').astype('uint64')
        rounded = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype('uint16')
        array = np.where(np.isnan(values), np.uint16(0x7fff), rounded)
    else:
        array = values.astype(dtype).view('uint16') if dtype == 'float16' else values
    return np.ascontiguousarray(array)


def loaded(array, dtype):
    """The values of `stored` as float64."""
    if dtype == 'bfloat16':
        return (array.astype('uint32') << 16).view('float32').astype('float64')
    return (array.view('float16') if dtype == 'float16' else array).astype('float64')


class Output:
    """An array of NaN to write to, between guards."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.size = shape, dtype, int(np.prod(shape))
        kind = 'float32' if dtype == 'float32' else 'uint16'
        self._all = np.full(self.size + 64, 0xffff if kind == 'uint16' else np.nan, kind)
        self._guard = self._all.copy()
        self.address = self._all.ctypes.data + 32 * self._all.itemsize

    def values(self):
        """The result as float64; fails if something was written around it."""
        for part in (slice(0, 32), slice(self.size + 32, None)):
            assert self._all[part].tobytes() == self._guard[part].tobytes(), 'written outside'
        return loaded(np.ascontiguousarray(self._all[32:self.size + 32]), self.dtype).reshape(self.shape)


def correlate(x, weight, dy):
    """Result and gradients of x and weight in float64, tap by tap, with nothing for taps on padding."""
    kernel, (height, width) = weight.shape[-1], x.shape[2:]
    y, dx, dweight = np.zeros(x.shape), np.zeros(x.shape), np.zeros(weight.shape)
    for ky, kx in np.ndindex(kernel, kernel):
        down, right = ky - kernel // 2, kx - kernel // 2
        out = (..., slice(max(0, -down), min(height, height - down)), slice(max(0, -right), min(width, width - right)))
        into = (..., slice(max(0, down), min(height, height + down)), slice(max(0, right), min(width, width + right)))
        if abs(down) >= height or abs(right) >= width:
            continue
        tap = weight[:, 0, ky, kx][:, None, None]
        y[out] += x[into] * tap
        dx[into] += dy[out] * tap
        dweight[:, 0, ky, kx] = (dy[out] * x[into]).sum((0, 2, 3))
    return y, dx, dweight


def run(kernels, arrays, dtype, path='auto', weight_type=None, relu=False):
    """Result and gradients of x, weight and bias of the kernels as float64."""
    x, weight, bias, dy = arrays
    weight_type = weight_type or dtype
    code = TYPES.index(weight_type)
    conv = Conv(*x.shape, weight.shape[-1], TYPES.index(dtype), gpu_kernels.PATHS.index(path), 0)
    x, dy = (stored(a, dtype) for a in (x, dy))
    weight, bias = (stored(a, weight_type) for a in (weight, bias))
    y, dx = Output(x.shape, dtype), Output(x.shape, dtype)
    dweight, dbias = Output(weight.shape, weight_type), Output(bias.shape, weight_type)
    work = Output((kernels.workspace(conv),), 'float32')
    address = [a.ctypes.data for a in (x, weight, bias, dy)]
    kernels.forward(conv, address[0], address[1], code, address[2], code, y.address, int(relu))
    kernels.input_gradient(conv, address[3], address[1], code, dx.address)
    kernels.weight_gradient(conv, address[0], address[3], dweight.address, code, work.address)
    kernels.bias_gradient(conv, address[3], dbias.address, code)
    work.values()
    return [output.values() for output in (y, dx, dweight, dbias)]


def draw(rng, shape, dtype, weight_type=None):
    """x, weight, bias and dy of values that the types hold exactly."""
    n, c, h, w, k = shape
    types = (dtype, weight_type or dtype, weight_type or dtype, dtype)
    return [loaded(stored(rng.standard_normal(size), kind), kind)
            for size, kind in zip(((n, c, h, w), (c, 1, k, k), (c,), (n, c, h, w)), types)]


def compare(kernels, shape, dtype, path='auto', seed=0):
    """Asserts that every result is within 8 units of float32 of the sum of |products|, and its own rounding."""
    arrays = x, weight, bias, dy = draw(np.random.default_rng(seed), shape, dtype)
    found = run(kernels, arrays, dtype, path)
    want, limit = (list(correlate(*each)) for each in ((x, weight, dy), [np.abs(a) for a in (x, weight, dy)]))
    want = [want[0] + bias[:, None, None], *want[1:], dy.sum((0, 2, 3))]
    limit = [limit[0] + np.abs(bias)[:, None, None], *limit[1:], np.abs(dy).sum((0, 2, 3))]
    for name, got, right, most in zip(('y', 'dx', 'dweight', 'dbias'), found, want, limit):
        own = 0 if dtype == 'float32' else UNIT[dtype]
        share = np.max(np.abs(got - right) / (16 * UNIT['float32'] * most + own * np.abs(right) + 1e-7))
        assert share <= 1.01, f'{name} of {shape} {dtype} {path}: {share}'
    return found


# shapes: N, C, H, W, K; one for each width of tiles and each size of kernels, and bands and column tiles
SHAPES = [(3, 2, 7, 7, 13), (2, 1, 9, 14, 27), (1, 2, 11, 28, 5), (1, 1, 6, 40, 31), (1, 1, 5, 70, 3), (5, 1, 3, 5, 63)]
LONG_SHAPES = [(3, 2, 56, 56, 31), (2, 2, 28, 28, 29), (5, 2, 14, 14, 27), (9, 2, 7, 7, 13), (1, 2, 20, 70, 31),
               (2, 1, 33, 17, 3), (1, 1, 5, 9, 51), (1, 1, 230, 12, 21), (2, 2, 9, 30, 63), (1, 1, 1, 1, 31),
               (1, 1, 70, 90, 63), (1, 1, 300, 20, 31)]


@needs_compiler
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('path', ['tensor', 'direct'])
def test_all_passes_on_small_shapes(emulated, dtype, path):
    for shape in SHAPES:
        compare(emulated(H100), shape, dtype, path)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize('card', [H100, A10, T4], ids=['H100', 'A10', 'T4'])
@pytest.mark.parametrize('dtype', TYPES)
def test_all_passes_on_more_shapes_and_cards(emulated, dtype, card):
    for shape in LONG_SHAPES:
        compare(emulated(card), shape, dtype, 'direct' if card is T4 else 'tensor')


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize('seed', range(8))
def test_all_passes_on_drawn_shapes(emulated, seed):
    rng = np.random.default_rng(seed)
    for _ in range(12):
        height, width = rng.integers(1, 40, 2)
        shape = (int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(height), int(width),
                 int(rng.choice([3, 5, 7, 9, 13, 17, 19, 27, 31, 33, 35, 47, 63])))
        compare(emulated([H100, A10, T4][rng.integers(3)], bool(rng.integers(2))), shape, TYPES[rng.integers(3)],
                ['auto', 'tensor', 'direct'][rng.integers(3)], seed)


@needs_compiler
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('path', ['tensor', 'direct'])
def test_the_order_of_threads_changes_no_bit(emulated, dtype, path):
    for shape in SHAPES[:4]:
        arrays = draw(np.random.default_rng(1), shape, dtype)
        found = [run(emulated(H100, backwards), arrays, dtype, path) for backwards in (False, True)]
        for one, other in zip(*found):
            np.testing.assert_array_equal(one, other)


@needs_compiler
@pytest.mark.parametrize('path', ['tensor', 'direct'])
def test_bands_and_column_tiles_where_shared_memory_is_small(emulated, path):
    """At 16 KB and more: two buffers, then one, then fewer images, then bands of rows, then no tensor cores at all."""
    for kilobytes in (16, 20, 24, 32, 48):
        for dtype, shape in (('float16', (1, 1, 60, 10, 31)), ('float32', (1, 1, 40, 12, 21)),
                             ('float16', (5, 1, 9, 6, 9))):
            compare(emulated((1, kilobytes * 1024, 8, 6)), shape, dtype, path)
    compare(emulated((1, 48 * 1024, 8, 6)), (1, 1, 3, 66, 63), 'float32', path)


@needs_compiler
@pytest.mark.parametrize('dtype, kernel', [('float16', 5), ('float32', 3)])
@pytest.mark.parametrize('path', ['tensor', 'direct'])
def test_blocks_that_go_through_several_groups_of_images(emulated, dtype, kernel, path):
    compare(emulated((1, *A10[1:])), (70, 64, 7, 7, kernel), dtype, path)


@needs_compiler
def test_what_the_automatic_choice_takes(emulated):
    """Tensor cores from capability 8.0 on but for small float32 maps, whose weight gradient uses them too."""
    def passes(card, shape, dtype):
        arrays = draw(np.random.default_rng(2), shape, dtype)
        kernels = emulated(card)
        auto, tensor, direct = (run(kernels, arrays, dtype, path) for path in ('auto', 'tensor', 'direct'))
        same = np.array_equal
        return ''.join('=' if same(t, d) else 't' if same(a, t) else 'd' if same(a, d) else '?'
                       for a, t, d in zip(auto[:3], tensor, direct))

    assert passes(A10, (1, 1, 6, 29, 9), 'float32') == 'ttt'
    assert passes(A10, (1, 1, 6, 28, 9), 'float32') == 'ddt'
    assert passes(T4, (1, 1, 6, 29, 9), 'float32') == '==='
    # In half precision most results are equal: where they differ, the automatic ones are those of tensor cores.
    assert set(passes(A10, (2, 1, 9, 14, 27), 'bfloat16')) <= {'t', '='}


@needs_compiler
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_float32_weights_of_half_precision_maps(emulated, dtype):
    """Mixed precision: weights are rounded to the map's type, their gradients stay float32."""
    for path in ('tensor', 'direct'):
        arrays = x, weight, bias, dy = draw(np.random.default_rng(3), (2, 2, 6, 9, 7), dtype, 'float32')
        found = run(emulated(A10), arrays, dtype, path, 'float32')
        rounded = loaded(stored(weight, dtype), dtype)
        half = run(emulated(A10), (x, rounded, bias, dy), dtype, path, 'float32')
        for one, other in zip(found, half):
            np.testing.assert_array_equal(one, other)
        want = correlate(x, rounded, dy)
        np.testing.assert_allclose(found[2], want[2], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found[3], dy.sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize('dtype', TYPES)
def test_relu_follows_the_bias_and_keeps_nan(emulated, dtype):
    for path in ('tensor', 'direct'):
        arrays = draw(np.random.default_rng(4), (2, 2, 6, 10, 5), dtype)
        arrays[0][1, 1, 2, 3] = np.nan
        plain, rectified = (run(emulated(H100), arrays, dtype, path, relu=relu)[0] for relu in (False, True))
        np.testing.assert_array_equal(rectified, np.where(plain < 0, 0, plain))
        assert np.isnan(rectified).sum() == 25 and (rectified == 0).any() and (rectified > 0).any()


@needs_compiler
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('path', ['tensor', 'direct'])
@pytest.mark.parametrize('value', [np.inf, np.nan])
def test_nan_and_inf_reach_what_they_meet_and_nothing_else(emulated, dtype, path, value):
    rng = np.random.default_rng(5)
    for shape in [(2, 2, 7, 8, 5), (3, 1, 7, 7, 13), (1, 1, 4, 70, 9)]:
        for place in range(4):
            for corner in (0, -1):
                x, weight, bias, dy = arrays = draw(rng, shape, dtype)
                arrays[place][(-1,) * (arrays[place].ndim - 2) + (corner,) * min(2, arrays[place].ndim)] = value
                found = run(emulated(A10), arrays, dtype, path)
                want = list(correlate(x, weight, dy))
                want[0] += bias[:, None, None]
                for mine, right in zip(found, [*want, dy.sum((0, 2, 3))]):
                    np.testing.assert_allclose(mine, right, rtol=2 * UNIT[dtype] + 1e-5, atol=1e-4)


@needs_compiler
def test_the_largest_float32_values_stay_finite(emulated):
    """They are infinite as bfloat16, of which tensor cores multiply three parts."""
    x, weight, bias, dy = draw(np.random.default_rng(6), (1, 1, 6, 9, 5), 'float32')
    x[:] = np.finfo('float32').max
    weight[:] = 1 / 256
    dy[:] = 2**-20
    for path in ('tensor', 'direct'):
        found = run(emulated(H100), (x, weight, bias, dy), 'float32', path)
        want = correlate(x, weight, dy)
        np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
        np.testing.assert_allclose(found[2], want[2], rtol=1e-6)


@needs_compiler
def test_shapes_that_the_kernels_do_not_take_are_refused(emulated):
    kernels = emulated(H100)
    for conv in [(1, 1, 4, 4, 4, 2, 0, 0), (1, 1, 4, 4, 65, 2, 0, 0), (0, 1, 4, 4, 5, 2, 0, 0),
                 (1, 1, 4, 4, 5, 3, 0, 0), (1, 1, 4, 4, 1, 2, 0, 0), (1, 1, 4, 4, 5, 2, 3, 0)]:
        with pytest.raises(RuntimeError, match='do not take'):
            kernels.bias_gradient(Conv(*conv), None, None, 2)
