"""Building the operator: cache, several processes, no compiler. The kernels alone: sanitizers and other targets."""
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import paddle_env
from large_kernel import build, fastest_precision

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get('CXX') or shutil.which('g++') or shutil.which('clang++')
NATIVE = '-march=native' if platform.machine() == 'x86_64' else '-mcpu=native'
TARGETS = {
    'native': ['-O2', NATIVE],
    'avx2': ['-O1', '-march=x86-64', '-mavx2', '-mfma'],
    'baseline': ['-O1'],
    # the code for AVX-512 and AMX on any processor: wide vectors that the compiler splits, and a model of AMX
    'wide': ['-O1', NATIVE, '-Wno-psabi', '-DLK_LANES=16', f'-DLK_AMX_MODEL="{ROOT}/tests/amx_model/amx_model.h"'],
    'sanitized': ['-O1', NATIVE, '-fsanitize=address,undefined', '-fno-sanitize-recover=all'],
    'aarch64': ['-O2', '-static'],
}
LONG = ('aarch64', 'avx2', 'native', 'sanitized', 'wide')  # minutes each
FOREIGN = {'aarch64': ('aarch64-linux-gnu-g++', 'qemu-aarch64')}  # Debian's g++-aarch64-linux-gnu and qemu-user

needs_operator = pytest.mark.skipif(build.reason_unavailable() is not None,
                                    reason=f'no C++ operator: {build.reason_unavailable()}')

CONVOLVE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import paddle, large_kernel
    from large_kernel import conv
    caught.clear()
    layer = large_kernel.DepthwiseConv2D(4, 21)
    for _ in range(2):
        x = paddle.randn([2, 4, 16, 16])
        x.stop_gradient = False
        layer(x).sum().backward()
print(conv.select(x, layer.weight, 1))
print([str(w.message) for w in caught if 'operator' in str(w.message)])
"""


def environment(tmp_path, **extra):
    names = ('CXX', 'LARGE_KERNEL_CONV_IMPL', 'XDG_CACHE_HOME')
    env = {k: v for k, v in os.environ.items() if k not in names}
    return {**env, 'LARGE_KERNEL_CACHE_DIR': str(tmp_path / 'cache'), **extra}


def python(arguments, env):
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.mark.skipif(COMPILER is None, reason='needs a C++ compiler')
def test_the_library_says_with_which_instructions_it_multiplies(monkeypatch, tmp_path):
    source, library = tmp_path / 'some.cc', tmp_path / 'some.so'
    source.write_text('extern "C" const char* large_kernel_bf16_instructions() { return "AMX"; }\n'
                      'extern "C" const char* large_kernel_int8_instructions() { return ""; }\n')
    subprocess.run([COMPILER, '-shared', '-fPIC', str(source), '-o', str(library)], check=True)
    monkeypatch.setattr(build, 'load_operator', lambda: library)
    assert build.instructions('bf16') == 'AMX' and fastest_precision() == 'bf16'
    assert build.instructions('int8') is None and build.instructions('fp8') is None
    monkeypatch.setattr(build, 'reason_unavailable', lambda: 'no compiler')
    assert build.instructions('bf16') is None and fastest_precision() == 'fp32'


@needs_operator
def test_instructions_are_those_of_this_processor():
    flags = paddle_env.cpu_info().get('flags', '').split()
    for precision, found in (('bf16', {'AMX': 'amx_bf16', 'AVX512_BF16': 'avx512_bf16'}),
                             ('int8', {'AMX': 'amx_int8', 'AVX512_VNNI': 'avx512_vnni', 'AVX-VNNI': 'avx_vnni'})):
        name = build.instructions(precision)
        assert name is None or found[name] in flags


@needs_operator
def test_processes_that_start_together_build_once(tmp_path):
    quick = tmp_path / 'g++'  # the last -O counts
    quick.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    quick.chmod(0o755)
    env = environment(tmp_path, CXX=str(quick))
    processes = [python(['-c', CONVOLVE], env) for _ in range(3)]
    outputs = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert all(out.split() == ['custom', '[]'] for out, _ in outputs)
    lines = [line for _, err in outputs for line in err.splitlines() if 'large_kernel' in line]
    assert len(lines) == 1 and 'built' in lines[0] and ' s: ' in lines[0]
    assert sorted(path.suffix for path in (tmp_path / 'cache').iterdir()) == ['.lock', '.so']
    ahead = python(['-m', 'large_kernel'], env)
    out, err = ahead.communicate(timeout=60)
    assert ahead.returncode == 0 and 'will be used on the CPU: custom' in out and 'built' not in err


def test_no_compiler_warns_once_and_another_implementation_is_used(tmp_path):
    env = environment(tmp_path, CXX='/nonexistent/g++')
    process = python(['-c', CONVOLVE], env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    name, warned = out.splitlines()
    assert name == 'fft' and warned.count('/nonexistent/g++ not found') == 1 and warned.count('operator') == 1
    ahead = python(['-m', 'large_kernel'], env)
    out, err = ahead.communicate(timeout=60)
    assert ahead.returncode == 0 and 'C++ operator: not available' in out and '/nonexistent/g++' in out
    assert 'Traceback' not in err


def test_custom_that_cannot_be_built_is_a_one_line_error(tmp_path):
    env = environment(tmp_path, CXX='/nonexistent/g++', LARGE_KERNEL_CONV_IMPL='custom')
    process = python(['-c', CONVOLVE], env)
    _, err = process.communicate(timeout=120)
    last = err.strip().splitlines()[-1]
    assert last.startswith('RuntimeError: LARGE_KERNEL_CONV_IMPL=custom: ') and '/nonexistent/g++' in last
    ahead = python(['-m', 'large_kernel'], env)
    ahead.communicate(timeout=60)
    assert ahead.returncode == 2


@pytest.mark.skipif(platform.system() != 'Linux', reason='the operator is built on Linux only')
def test_a_failed_build_names_the_compilers_error(tmp_path, monkeypatch):
    compiler = tmp_path / 'broken-g++'
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\n'
                        'echo "x.cc:1:1: error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setenv('LARGE_KERNEL_CACHE_DIR', str(tmp_path / 'cache'))
    with pytest.raises(build.BuildError, match='error: no such thing') as caught:
        build.library_path()
    assert '\n' not in str(caught.value)
    assert not list((tmp_path / 'cache').glob('*.so'))


@pytest.mark.skipif(platform.system() != 'Linux', reason='the operator is built on Linux only')
def test_an_unwritable_cache_is_replaced_by_a_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.setenv('LARGE_KERNEL_CACHE_DIR', str(tmp_path / 'file' / 'cache'))
    folder = build._cache_dir()
    assert folder.parent == tmp_path and folder.is_dir()
    folder.chmod(0o777)  # others could plant a library in it
    other = build._cache_dir()
    assert other != folder and not other.stat().st_mode & 0o022


def test_a_library_that_is_missing_or_broken_is_a_build_error(tmp_path, monkeypatch):
    monkeypatch.setattr(build, '_registered', None)
    with pytest.raises(build.BuildError, match='does not exist'):
        build.load_operator(tmp_path / 'none.so')
    (tmp_path / 'broken.so').write_bytes(b'not a library')
    with pytest.raises(build.BuildError, match='cannot be loaded'):
        build.load_operator(tmp_path / 'broken.so')


@needs_operator
def test_a_library_built_without_pythons_headers_has_no_direct_call(tmp_path, monkeypatch):
    monkeypatch.setattr('sysconfig.get_path', lambda name: str(tmp_path))
    compile_, _ = build._commands(['g++'], tmp_path, tmp_path / 'library.so')
    assert str(tmp_path) not in compile_  # as an include folder
    source, library = tmp_path / 'empty.cc', tmp_path / 'empty.so'
    source.write_text('')
    subprocess.run([COMPILER, '-shared', '-fPIC', str(source), '-o', str(library)], check=True)
    assert build._direct_module(library) is None


@pytest.fixture(scope='module')
def programs(tmp_path_factory, pytestconfig):
    """tests/sanitize/main.cc, the kernels without Paddle, compiled for several targets in parallel.

    Returns:
        {target: path}, without the targets that this compiler does not support.
    """
    folder, compilers = tmp_path_factory.mktemp('kernels'), {}
    empty = folder / 'empty.cc'
    empty.write_text('int main() {}\n')
    for target in TARGETS:
        needed = FOREIGN.get(target, (COMPILER,))
        command = [needed[0], *TARGETS[target], '-fopenmp', '-o', str(folder / target)]
        wanted = pytestconfig.getoption('--long') or target not in LONG
        if (wanted and all(map(shutil.which, needed))
                and not subprocess.run([*command, str(empty)], capture_output=True).returncode):
            compilers[target] = subprocess.Popen(
                [*command, '-ffp-contract=fast', '-std=c++17', '-Wall', '-Wextra', '-Werror',
                 '-I', str(ROOT / 'large_kernel' / 'csrc'), str(ROOT / 'tests' / 'sanitize' / 'main.cc')])
    assert not any([compiler.wait() for compiler in compilers.values()])
    return {target: folder / target for target in compilers}


@pytest.mark.skipif(not COMPILER or platform.machine() != 'x86_64', reason='no C++ compiler for x86-64')
def test_the_products_compile_to_the_instructions_of_newer_processors(tmp_path):
    source, flags = tmp_path / 'products.cc', ['-O2', '-std=c++17', '-fopenmp', '-march=sapphirerapids']
    arguments = 'BlockedMatrix, BlockedMatrix, int, bool, Vec*, std::ptrdiff_t, WeightPrefetcher&'
    tiles = ''.join(f'template void {tile}({arguments});\n' for tile in (
        'gemm_tile<Bfloat16Product, 3>', 'gemm_tile<Int8Product, 3>', 'amx_gemm_tile<Bfloat16Product, 2>',
        'amx_gemm_tile<Int8Product, 2>'))
    source.write_text(f'#include "conv_gemm.h"\nusing namespace large_kernel;\n{tiles}'
                      'void enter() { AmxTiles registers(has_amx()); }\n')
    command = [COMPILER, *flags, '-I', str(ROOT / 'large_kernel' / 'csrc'), '-S', '-o', '-', str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if 'bad value' in done.stderr or 'unsupported argument' in done.stderr:
        pytest.skip(f'{COMPILER} does not know Sapphire Rapids')
    assert done.returncode == 0, done.stderr[-2000:]
    for instruction in ('vdpbf16ps', 'vpdpbusd', 'tdpbf16ps', 'tdpbusd', 'ldtilecfg', 'tilerelease'):
        assert re.search(rf'^\s+{instruction}\b', done.stdout, re.M), instruction
    # a configuration on the stack would lose the sizes of the tiles, see `AmxTiles`
    assert re.search(r'^\s+ldtilecfg\s+\S*config\S*\(%rip\)', done.stdout, re.M)


@pytest.mark.skipif(not COMPILER, reason='no C++ compiler')
@pytest.mark.parametrize('target', [pytest.param(t, marks=pytest.mark.long) if t in LONG else t for t in TARGETS])
def test_kernels_alone(programs, target):
    """Shapes in buffers of exactly the tensors' size, for the code of a small and of a large L1 cache."""
    if target == 'avx2' and 'avx2' not in Path('/proc/cpuinfo').read_text():
        pytest.skip('this processor has no AVX2')
    if target not in programs:
        pytest.skip(f'needs {" and ".join(FOREIGN[target])}' if target in FOREIGN else
                    f'{COMPILER} does not support {" ".join(TARGETS[target])}')
    shapes = {'sanitized': '2', 'aarch64': '1'}.get(target, '3')
    result = subprocess.run([*FOREIGN.get(target, ())[1:], str(programs[target]), shapes],
                            env={**os.environ, 'OMP_NUM_THREADS': '3'}, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert result.stdout.count(', 0 failures') == 2  # one line for each size of the L1 cache
