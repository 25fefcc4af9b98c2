"""Compiles the CUDA kernels (csrc/cuda) with nvcc. Imports nothing of Paddle, so that benchmarks run without it."""
import concurrent.futures
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / 'csrc' / 'cuda'
TOOLKITS = ('/usr/local/cuda',)
TIMEOUT = 1800  # seconds for one file


class NvccError(RuntimeError):
    """The kernels cannot be compiled; the message gives the reason in one line."""


def find():
    """Path of nvcc: of CUDA_HOME or CUDA_PATH, on PATH, in /usr/local/cuda, or of NVIDIA's packages from PyPI.

    Raises:
        NvccError: there is none.
    """
    homes = [os.environ[name] for name in ('CUDA_HOME', 'CUDA_PATH') if os.environ.get(name)]
    candidates = [Path(home) / 'bin' / 'nvcc' for home in homes]
    if not homes:
        on_path = shutil.which('nvcc')
        candidates += [Path(on_path)] if on_path else []
        candidates += [Path(folder) / 'bin' / 'nvcc' for folder in TOOLKITS]
        for folder in sys.path:  # nvidia-cuda-nvcc-cu11 and its later versions
            candidates += sorted(Path(folder or '.').glob('nvidia/*/bin/nvcc'))
    for path in candidates:
        if os.access(path, os.X_OK):
            return path
    where = f' in {" or ".join(homes)} (CUDA_HOME, CUDA_PATH)' if homes else ''
    raise NvccError(f'no nvcc found{where}: install the CUDA toolkit, or set CUDA_HOME to its folder')


def host_options(nvcc):
    """Options for the host compiler, CXX if it is set, and for headers that PyPI's packages keep elsewhere."""
    packages = nvcc.resolve().parents[2]
    folders = sorted(packages.glob('*/include')) if packages.name == 'nvidia' else []
    compiler = shlex.split(os.environ.get('CXX') or '')[:1]
    return [*(f'-ccbin={path}' for path in compiler), *(f'-I{folder}' for folder in folders)]


def version(nvcc):
    """The text of nvcc --version.

    Raises:
        NvccError: it does not run.
    """
    return run([str(nvcc), '--version'])


def compile_command(nvcc, source, unit, capability):
    """Command that compiles one .cu file for a compute capability such as (8, 0), with PTX for later cards."""
    arch = '{}{}'.format(*capability)
    return [str(nvcc), '-O3', '-std=c++17', '-w', '-Xcompiler', '-fPIC', *host_options(nvcc),
            '-gencode', f'arch=compute_{arch},code=[sm_{arch},compute_{arch}]', '-c', str(source), '-o', str(unit)]


def compile_units(nvcc, folder, capability):
    """Compiles the kernels, all files at once, into `folder`; returns the paths of the objects.

    Raises:
        NvccError: the compiler failed.
    """
    sources = sorted(SOURCES.glob('*.cu'))
    units = [Path(folder) / f'{source.stem}.o' for source in sources]
    with concurrent.futures.ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(run, [compile_command(nvcc, s, u, capability) for s, u in zip(sources, units)]))
    return units


def link(nvcc, units, library, options=()):
    """Links compiled files and CUDA's static runtime into a shared library.

    Raises:
        NvccError: the linker failed.
    """
    run([str(nvcc), '--shared', '-cudart', 'static', *host_options(nvcc), '-o', str(library), *map(str, units),
         *options])


def build(library, capability):
    """Makes a shared library of the kernels alone, with the functions of csrc/cuda/kernels.h.

    Raises:
        NvccError: there is no nvcc, or it failed.
    """
    nvcc = find()
    print(f'compiling the CUDA kernels with {nvcc}: about five minutes of processor time', file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=Path(library).parent) as folder:
        unfinished = Path(folder) / 'library.so'
        link(nvcc, compile_units(nvcc, folder, capability), unfinished)
        os.replace(unfinished, library)


def run(command):
    """Output of a command; raises NvccError if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NvccError(' '.join(str(error).split())) from None
    if result.returncode:
        lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if 'error' in line), lines[-1] if lines else 'no message')
        raise NvccError(f'{command[0]} failed: {reason}')
    return result.stdout
