"""The kernels without Paddle as programs, tests/sanitize/main.cc compiled for several targets."""
import contextlib
import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get('CXX') or shutil.which('g++') or shutil.which('clang++')
NATIVE = '-march=native' if platform.machine() == 'x86_64' else '-mcpu=native'
TARGETS = {
    'native': ['-O2', NATIVE],
    'avx2': ['-O1', '-march=x86-64', '-mavx2', '-mfma'],
    'baseline': ['-O1'],
    'sanitized': ['-O1', NATIVE, '-fsanitize=address,undefined', '-fno-sanitize-recover=all'],
}
LONG = ('avx2', 'native')  # take minutes


@contextlib.contextmanager
def started(folder, targets):
    """The compilers of these targets, all started at once, as {target: (path of the program, process)} without those
    targets that this compiler lacks. What tests do meanwhile goes first."""
    processes = {}
    empty = folder / 'empty.cc'
    empty.write_text('int main() {}\n')
    try:
        for target in targets if COMPILER else ():
            program = folder / target
            command = [COMPILER, *TARGETS[target], '-fopenmp', '-o', str(program)]
            if subprocess.run([*command, str(empty)], capture_output=True).returncode:
                continue
            processes[target] = program, subprocess.Popen(
                ['nice', *command, '-ffp-contract=fast', '-std=c++17', '-Wall', '-Wextra', '-Werror',
                 '-I', str(ROOT / 'large_kernel' / 'csrc'), str(ROOT / 'tests' / 'sanitize' / 'main.cc')],
                start_new_session=True)
        yield processes
    finally:
        for _, compiler in processes.values():
            if compiler.poll() is None:  # the driver and the compiler it runs
                os.killpg(compiler.pid, signal.SIGTERM)
            compiler.wait()
