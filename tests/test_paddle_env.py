"""The environment set before Paddle: where it is right, and only there."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paddle_env

ROOT = Path(__file__).parent.parent
AMD = {'vendor_id': 'AuthenticAMD', 'flags': 'fpu avx2 avx512f'}


@pytest.fixture
def machine(monkeypatch):
    """An x86-64 Linux machine with an AMD processor with AVX-512 and a Paddle that bundles the old MKL."""
    monkeypatch.delenv(paddle_env.VARIABLE, raising=False)
    monkeypatch.setattr('platform.system', lambda: 'Linux')
    monkeypatch.setattr('platform.machine', lambda: 'x86_64')
    monkeypatch.setattr(paddle_env, 'cpu_info', lambda: AMD)
    monkeypatch.setattr(paddle_env, '_bundles_old_mkl', lambda: True)
    return monkeypatch


def test_set_on_amd_with_avx512(machine):
    assert '7 set' in paddle_env._configure() and os.environ[paddle_env.VARIABLE] == '7'


def test_never_over_the_users_setting(machine):
    machine.setenv(paddle_env.VARIABLE, '5')
    assert 'user' in paddle_env._configure() and os.environ[paddle_env.VARIABLE] == '5'


@pytest.mark.parametrize('target, value', [
    ('platform.system', lambda: 'Darwin'), ('platform.machine', lambda: 'aarch64'),
    ('paddle_env.cpu_info', lambda: {**AMD, 'vendor_id': 'GenuineIntel'}),
    ('paddle_env.cpu_info', lambda: {**AMD, 'flags': 'fpu avx2'}), ('paddle_env.cpu_info', dict),
    ('paddle_env._bundles_old_mkl', lambda: False),
])
def test_left_alone_elsewhere(machine, target, value):
    machine.setattr(target, value)
    assert 'left alone' in paddle_env._configure() and paddle_env.VARIABLE not in os.environ


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
            'print(n, len(os.sched_getaffinity(0)))\n')
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    if user:
        env['OMP_NUM_THREADS'] = user
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True).stdout.split()
    assert int(out[0]) == (int(out[1]) if expected == 'cores' else expected)
