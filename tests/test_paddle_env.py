"""The environment is set before Paddle where it helps, and only there."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paddle_env

ROOT = Path(__file__).parent.parent
AMD = {'vendor_id': 'AuthenticAMD', 'flags': 'fpu avx2 fma avx512f'}


@pytest.fixture
def machine(monkeypatch):
    """An x86-64 Linux machine with an AMD processor with AVX-512 and a Paddle that bundles the old MKL."""
    monkeypatch.setenv(paddle_env.VARIABLE, '')  # so that what the test leaves is undone, where it was not set before
    monkeypatch.delenv(paddle_env.VARIABLE)
    monkeypatch.setattr('platform.system', lambda: 'Linux')
    monkeypatch.setattr('platform.machine', lambda: 'x86_64')
    monkeypatch.setattr(paddle_env, 'cpu_info', lambda: AMD)
    monkeypatch.setattr(paddle_env, '_bundles_old_mkl', lambda: True)
    return monkeypatch


@pytest.mark.parametrize(('flags', 'code'), [('fpu avx2 fma avx512f', '7'), ('fpu avx2 fma', '5')])
def test_set_on_amd(machine, flags, code):
    machine.setattr(paddle_env, 'cpu_info', lambda: {**AMD, 'flags': flags})
    assert f'{code} set' in paddle_env._configure_mkl() and os.environ[paddle_env.VARIABLE] == code


def test_never_over_the_users_setting(machine):
    machine.setenv(paddle_env.VARIABLE, '5')
    assert 'from the environment' in paddle_env._configure_mkl() and os.environ[paddle_env.VARIABLE] == '5'


@pytest.mark.parametrize('target, value', [
    ('platform.system', lambda: 'Darwin'), ('platform.machine', lambda: 'aarch64'),
    ('paddle_env.cpu_info', lambda: {**AMD, 'vendor_id': 'GenuineIntel'}),
    ('paddle_env.cpu_info', lambda: {**AMD, 'flags': 'fpu avx fma'}), ('paddle_env.cpu_info', dict),
    ('paddle_env._bundles_old_mkl', lambda: False),
])
def test_left_alone_elsewhere(machine, target, value):
    machine.setattr(target, value)
    assert 'left alone' in paddle_env._configure_mkl() and paddle_env.VARIABLE not in os.environ


def test_users_malloc_settings_stand(monkeypatch):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '1000')
    assert paddle_env._configure_malloc() == 'malloc as set by the user'
    monkeypatch.delenv('MALLOC_TRIM_THRESHOLD_')
    monkeypatch.setattr('platform.libc_ver', lambda: ('musl', '1.2'))
    assert 'left alone' in paddle_env._configure_malloc()
    assert 'malloc' in paddle_env.describe()


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='counts page faults through /proc')
def test_freed_activations_are_not_faulted_in_again():
    code = ('{}\n'
            'import paddle, resource\n'
            'x = paddle.zeros([26, 128, 56, 56])\n'  # 42 MB: over what glibc keeps at most otherwise
            'relu = paddle.nn.functional.relu\n'
            'for _ in range(5): relu(x)\n'
            'before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
            'for _ in range(20): relu(x)\n'
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n')
    names = ('MALLOC_MMAP_MAX_', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'GLIBC_TUNABLES')
    env = {k: v for k, v in os.environ.items() if k not in names}
    faults = [int(subprocess.run([sys.executable, '-W', 'ignore', '-c', code.format(first)], cwd=ROOT, env=env,
                                 capture_output=True, text=True).stdout.split()[-1])
              for first in ('import paddle_env', '')]
    assert faults[0] <= faults[1] / 2, faults  # Paddle 2.6 keeps the memory by itself: none in both


def test_cpu_info(tmp_path):
    (tmp_path / 'cpuinfo').write_text('processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f\n\n'
                                      'processor\t: 1\nvendor_id\t: other\n')
    info = paddle_env.cpu_info(tmp_path / 'cpuinfo')
    assert info == {'processor': '0', 'vendor_id': 'AuthenticAMD', 'flags': 'fpu avx512f'}
    assert paddle_env.cpu_info(tmp_path / 'none') == {}


@pytest.mark.parametrize('user, arguments, expected', [
    (None, '', 'cores'), (None, 'processes=64', 1), ('3', '', 3), ('3', 'threads=2', 2),
])
def test_threads(user, arguments, expected):
    code = ('import ctypes, os, paddle_env, paddle\n'
            f'n = paddle_env.set_threads({arguments})\n'
            'from paddle.base import core\n'
            'print(n, len(os.sched_getaffinity(0)), flush=True)\n'
            'os._exit(0)')  # the interpreter would take a second to end
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    if user:
        env['OMP_NUM_THREADS'] = user
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True).stdout.split()
    assert int(out[0]) == (int(out[1]) if expected == 'cores' else expected)


@pytest.mark.parametrize('name, value, mentioned', [
    ('OMP_PROC_BIND', 'true', True), ('OMP_PROC_BIND', 'false', False), ('OMP_PLACES', 'cores', True)])
def test_binding_that_stops_mkls_threads_is_pointed_out(monkeypatch, name, value, mentioned):
    for variable in ('OMP_PROC_BIND', 'OMP_PLACES'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    assert ('KMP_AFFINITY' in paddle_env.describe()) == mentioned
