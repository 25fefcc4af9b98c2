"""Paddle's CUDA operator without a GPU: on a CPU with emulated kernels, compiled by nvcc, and what is said without it.

The operator's own code, its gradients and the choice of it are those of a GPU; the kernels are emulated.
"""
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from test_cuda_kernels import COMPILER, FLAGS, KERNELS, ROOT, correlate, emulated_objects

from large_kernel import DepthwiseConv2D, build, conv, cuda, depthwise_conv2d, nvcc

import paddle  # isort: skip

SUPPORTED = build.reason_unavailable() is None
needs_compiler = pytest.mark.skipif(not SUPPORTED, reason=f'no C++ operator: {build.reason_unavailable()}')


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """The operator with emulated kernels, registered with Paddle."""
    folder = tmp_path_factory.mktemp('operator')
    include, libs = paddle.sysconfig.get_include(), paddle.sysconfig.get_lib()
    unit, path = folder / 'binding.o', folder / 'operator.so'
    binding = subprocess.Popen([*COMPILER.split(), *FLAGS, '-D_GLIBCXX_USE_CXX11_ABI=1', '-DLARGE_KERNEL_EMULATION',
                                '-DPADDLE_WITH_CUSTOM_KERNEL', f'-I{include}', f'-I{include}/third_party', '-c',
                                str(KERNELS / 'operator.cc'), '-o', str(unit)])
    objects = emulated_objects(folder)
    assert not binding.wait()
    core = f'{include}/../base'
    subprocess.run([*COMPILER.split(), '-shared', '-o', str(path), str(unit), *map(str, objects), f'-L{core}',
                    f'-L{libs}', f'-Wl,-rpath,{core}:{libs}', '-Wl,--no-as-needed', '-l:libpaddle.so'], check=True)
    build.register(path)
    return path


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors count as being on a GPU, where only the CUDA operator and Paddle's own convolutions are available."""
    monkeypatch.delenv(conv.VARIABLE, raising=False)
    monkeypatch.setattr(build, 'direct', None)
    monkeypatch.setattr(conv, '_on_cpu', lambda x: False)
    monkeypatch.setattr(cuda, 'on_gpu', lambda x: True)
    monkeypatch.setattr(cuda, '_warned', False)


@pytest.fixture
def operator(library, on_gpu, monkeypatch):
    monkeypatch.setattr(cuda, 'reason_unavailable', lambda device=0: None)


def tensor(values, dtype='float32'):
    made = paddle.to_tensor(np.asarray(values, 'float32')).astype(dtype).detach()
    made.stop_gradient = False
    return made


def plain(t):
    return t.astype('float32').numpy().astype('float64')


@needs_compiler
@pytest.mark.parametrize('dtype, parameters, tolerance', [('float32', 'float32', 1e-5), ('float16', 'float32', 2e-3),
                                                          ('float16', 'float16', 2e-3)])
@pytest.mark.parametrize('with_bias', [False, True])
def test_result_and_gradients(operator, dtype, parameters, tolerance, with_bias):
    rng = np.random.default_rng(0)
    x, weight = tensor(rng.standard_normal((2, 3, 9, 7)), dtype), tensor(rng.standard_normal((3, 1, 7, 7)), parameters)
    bias = tensor(rng.standard_normal(3), parameters) if with_bias else None
    assert conv.select(x, weight, 1) == 'cuda'
    y, dy = depthwise_conv2d(x, weight, bias), tensor(rng.standard_normal((2, 3, 9, 7)), dtype)
    inputs = [x, weight, *([bias] if with_bias else [])]
    grads = paddle.grad([y], inputs, [dy])
    assert y.dtype == x.dtype and [g.dtype for g in grads] == [t.dtype for t in inputs]
    want = list(correlate(plain(x), plain(weight.astype(dtype)), plain(dy)))
    if with_bias:
        want = [want[0] + plain(bias)[:, None, None], *want[1:], plain(dy).sum((0, 2, 3))]
    for found, right in zip([y, *grads], want):
        assert np.linalg.norm(plain(found) - right) <= tolerance * np.linalg.norm(right)


@needs_compiler
def test_frozen_inputs_and_weights(operator):
    x, weight = tensor(np.ones((1, 2, 6, 6))), tensor(np.ones((2, 1, 5, 5)))
    both = paddle.grad([depthwise_conv2d(x, weight).sum()], [x, weight])
    np.testing.assert_array_equal(paddle.grad([depthwise_conv2d(x, weight.detach()).sum()], [x])[0], both[0])
    np.testing.assert_array_equal(paddle.grad([depthwise_conv2d(x.detach(), weight).sum()], [weight])[0], both[1])
    with paddle.no_grad():
        assert depthwise_conv2d(x, weight).stop_gradient


@needs_compiler
def test_mixed_precision_computes_in_its_dtype_with_float32_gradients_of_weights(operator, monkeypatch):
    monkeypatch.setattr(cuda, 'autocast_dtype', lambda: 'float16')
    paddle.seed(0)
    layer, x = DepthwiseConv2D(2, 7), tensor(np.random.default_rng(1).standard_normal((2, 2, 8, 8)))
    y = layer(x)
    (y.astype('float32') ** 2).sum().backward()
    assert y.dtype == paddle.float16
    assert {t.grad.dtype for t in (x, layer.weight, layer.bias)} == {paddle.float32}
    want = paddle.nn.functional.conv2d(x, layer.weight, layer.bias, padding=3, groups=2)
    np.testing.assert_allclose(plain(y), plain(want), atol=3e-3 * float(want.abs().max()))


def test_mixed_precision_is_off_outside_of_auto_cast():
    assert cuda.autocast_dtype() is None
    with paddle.amp.auto_cast(enable=False):
        assert cuda.autocast_dtype() is None


@needs_compiler
def test_recomputation_and_inputs_that_are_not_contiguous(operator):
    from paddle.distributed.fleet.utils import recompute
    layer = DepthwiseConv2D(3, 5)
    x = paddle.randn([2, 7, 3, 8]).transpose([0, 2, 1, 3])
    x.stop_gradient = False
    found = []
    for run in (layer, lambda x: recompute(layer, x)):
        layer.clear_gradients()
        x.clear_gradient()
        run(x).pow(2).sum().backward()
        found.append([t.grad.numpy().copy() for t in (x, layer.weight, layer.bias)])
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)
    want = paddle.nn.functional.conv2d(x, layer.weight, layer.bias, padding=2, groups=3)
    np.testing.assert_allclose(layer(x).numpy(), want.numpy(), atol=1e-5)


@needs_compiler
def test_the_check_may_come_inside_of_recomputation(operator, monkeypatch):
    from paddle.distributed.fleet.utils import recompute
    layer, checks = DepthwiseConv2D(3, 5), []

    def available(device=0):
        checks.append(cuda._self_check(paddle.CPUPlace()))
        return checks[-1]
    monkeypatch.setattr(cuda, 'reason_unavailable', available)
    x = tensor(np.random.default_rng(2).standard_normal((1, 3, 8, 8)))
    recompute(layer, x, use_reentrant=False).pow(2).sum().backward()
    assert checks and set(checks) == {None}
    found = x.grad.numpy().copy()
    x.clear_gradient()
    layer(x).pow(2).sum().backward()
    np.testing.assert_array_equal(found, x.grad.numpy())


@needs_compiler
def test_wrong_arguments_of_the_operator_are_refused(operator):
    x, weight = tensor(np.ones((1, 2, 6, 6))), tensor(np.ones((2, 1, 5, 5)))
    for wrong in (tensor(np.ones((3, 1, 5, 5))), tensor(np.ones((2, 1, 4, 4))), tensor(np.ones((2, 1, 65, 65))),
                  weight.astype('int32')):
        with pytest.raises((ValueError, RuntimeError, OSError), match='large_kernel_cuda|do not take'):
            cuda.run_cuda(x, wrong, None)


@needs_compiler
def test_the_operator_is_checked_before_it_is_used(library, monkeypatch):
    place = paddle.CPUPlace()
    assert cuda._self_check(place) is None
    for dtype, most in (('float32', 1e-5), ('float16', 1e-3)):
        assert cuda._difference(dtype, place) < most
    right = cuda.run_cuda
    monkeypatch.setattr(cuda, 'run_cuda', lambda *arguments: right(*arguments) * 1.1)
    assert 'float32 results are wrong' in cuda._self_check(place)

    def dies(*arguments):
        raise RuntimeError('CUDA driver version is insufficient\nfor CUDA runtime version')
    monkeypatch.setattr(cuda, 'run_cuda', dies)
    reason = cuda._self_check(place)
    assert reason.startswith('it does not run on this GPU') and '\n' not in reason


@pytest.mark.parametrize('kernel, stride', [(3, 1), (1, 1), (5, 2), (31, 2)])
def test_other_layers_stay_with_paddle(on_gpu, monkeypatch, kernel, stride):
    monkeypatch.setattr(cuda, 'reason_unavailable', lambda device=0: None)
    x, weight = tensor(np.ones((1, 2, 6, 6))), tensor(np.ones((2, 1, kernel, kernel)))
    assert conv.select(x, weight, stride) in ('fft', 'native')
    monkeypatch.setenv(conv.VARIABLE, 'custom')
    assert conv.select(x, weight, stride) == 'native'


def test_without_it_one_warning_says_what_is_lost(on_gpu, monkeypatch):
    monkeypatch.setattr(cuda, 'reason_unavailable', lambda device=0: 'no nvcc found')
    x, weight = tensor(np.ones((1, 2, 9, 9))), tensor(np.ones((2, 1, 7, 7)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            assert conv.select(x, weight, 1) in ('fft', 'native')
    lines = [str(w.message) for w in caught if 'CUDA operator' in str(w.message)]
    assert len(lines) == 1 and 'many times slower' in lines[0] and 'no nvcc found' in lines[0]
    monkeypatch.setenv(conv.VARIABLE, 'custom')
    with pytest.raises(RuntimeError, match='LARGE_KERNEL_CONV_IMPL=custom: no nvcc found'):
        conv.select(x, weight, 1)


def test_a_paddle_without_cuda_is_named(monkeypatch):
    cuda.reason_unavailable.cache_clear()
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: False)
    assert cuda.reason_unavailable() == 'this Paddle is built without CUDA'
    cuda.reason_unavailable.cache_clear()


def test_an_nvcc_that_is_missing_or_broken_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    monkeypatch.setenv('LARGE_KERNEL_CACHE_DIR', str(tmp_path / 'cache'))
    with pytest.raises(build.BuildError, match='no nvcc found in .*CUDA_HOME') as caught:
        cuda.library_path((8, 0))
    assert '\n' not in str(caught.value)
    compiler = tmp_path / 'bin' / 'nvcc'
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\n'
                        'echo "x.cu(1): error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    with pytest.raises(build.BuildError, match='error: no such thing') as caught:
        cuda.library_path((8, 0))
    assert '\n' not in str(caught.value) and not list((tmp_path / 'cache').glob('*.so'))


def test_nvcc_is_found_in_pypis_packages(tmp_path, monkeypatch):
    for name in ('CUDA_HOME', 'CUDA_PATH', 'CXX'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('shutil.which', lambda name: None)
    compiler = tmp_path / 'nvidia' / 'cuda_nvcc' / 'bin' / 'nvcc'
    for folder in (compiler.parent, tmp_path / 'nvidia' / 'cuda_runtime' / 'include'):
        folder.mkdir(parents=True)
    compiler.write_text('')
    compiler.chmod(0o755)
    monkeypatch.setattr(nvcc, 'TOOLKITS', ())
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    assert nvcc.find() == compiler
    assert nvcc.host_options(compiler) == [f'-I{tmp_path}/nvidia/cuda_runtime/include']


def has_nvcc():
    try:
        nvcc.version(nvcc.find())
    except nvcc.NvccError:
        return False
    return True


@pytest.mark.long
@pytest.mark.skipif(not has_nvcc(), reason='no nvcc')
@pytest.mark.parametrize('capability', [(8, 0), (9, 0)])
def test_nvcc_compiles_the_operator_and_paddle_imports_it(capability, tmp_path):
    """On Paddle for CPUs too; its functions cannot be called there."""
    code = f'''
import paddle_env, paddle
from large_kernel import build, cuda
path = cuda.library_path({capability})
assert path == cuda.library_path({capability})
build.register(path)
print('imported', path)
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'LARGE_KERNEL_CACHE_DIR': str(tmp_path)})
    assert done.returncode == 0 and 'imported' in done.stdout, done.stderr
    assert done.stderr.count('built the CUDA operator') == 1


@pytest.mark.long
@pytest.mark.skipif(not has_nvcc(), reason='no nvcc')
def test_the_kernels_stay_in_registers(tmp_path):
    """The prototype that was measured on an H100 spills up to 96 bytes; sums in memory would take a kilobyte."""
    command = nvcc.compile_command(nvcc.find(), KERNELS / 'float16.cu', tmp_path / 'float16.o', (9, 0))
    done = subprocess.run([*command, '-Xptxas', '-v'], capture_output=True, text=True)
    spilled = [int(count) for count in re.findall(r'(\d+) bytes spill loads', done.stderr)]
    assert done.returncode == 0 and len(spilled) > 20 and max(spilled) <= 96, done.stderr[-2000:]
