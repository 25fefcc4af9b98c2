"""Builds the C++ operator on first use into a per-user cache, and registers it with Paddle.

The library's file name is a hash of everything it depends on (sources, Paddle, compiler, flags, processor): a change
to any of them triggers a new build, and machines that share a home directory do not share machine code.
LARGE_KERNEL_CACHE_DIR moves the cache.
"""
import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import paddle_env

import paddle  # isort: skip

SOURCES = Path(__file__).parent / 'csrc'
TIMEOUT = 600  # seconds for the compiler
OPERATORS = 4  # version of the operators' interface: programs exported with another version do not run


class BuildError(RuntimeError):
    """The operator cannot be built or loaded on this machine; the message gives the reason in one line."""


def _compiler():
    """The C++ compiler as an argument list; CXX overrides, as in any build."""
    command = shlex.split(os.environ.get('CXX') or '') or [shutil.which('g++') or shutil.which('clang++') or 'g++']
    if not shutil.which(command[0]):
        raise BuildError(f'no C++ compiler: {command[0]} not found (install g++, or set CXX)')
    return command


def _flags():
    # -march=native selects AVX-512, AVX2 or SSE on x86; -mcpu=native is its counterpart on ARM. -ffp-contract=fast
    # allows FMA instructions. At -O3 GCC keeps fewer accumulators in registers.
    native = '-march=native' if platform.machine() in ('x86_64', 'AMD64', 'i686') else '-mcpu=native'
    return ['-O2', native, '-ffp-contract=fast', '-std=c++17', '-fPIC', '-w', '-D_GLIBCXX_USE_CXX11_ABI=1',
            '-DPADDLE_WITH_CUSTOM_KERNEL']


def _python_headers():
    """Compiler options to find Python.h; none where it is not installed, and `direct` is None then."""
    folder = sysconfig.get_path('include')
    return ['-I', folder] if os.path.exists(os.path.join(folder, 'Python.h')) else []


def _commands(compiler, folder, library):
    """The compile and the link command."""
    include, libs = Path(paddle.sysconfig.get_include()), Path(paddle.sysconfig.get_lib())
    core = libs.parent / 'base'
    # Paddle's own OpenMP runtime where it ships one: two runtimes would compete for the cores.
    openmp = ['-l:libiomp5.so'] if (libs / 'libiomp5.so').exists() else ['-fopenmp']
    unit = str(Path(folder) / 'operator.o')
    compile_ = [*compiler, *_flags(), '-fopenmp', '-I', str(include), '-I', str(include / 'third_party'),
                *_python_headers(), '-c', str(SOURCES / 'operator.cc'), '-o', unit]
    link = [*compiler, '-shared', unit, '-o', str(library), f'-L{core}', f'-L{libs}', f'-Wl,-rpath,{core}:{libs}',
            '-Wl,--no-as-needed', '-l:libpaddle.so', *openmp]
    return compile_, link


def _key(compiler):
    info = paddle_env.cpu_info()
    version = subprocess.run([*compiler, '--version'], capture_output=True, text=True, timeout=60)
    if version.returncode:
        raise BuildError(f'{compiler[0]} --version failed: {_last_line(version.stderr)}')
    parts = [paddle.__version__, paddle.version.commit, str(Path(paddle.__file__).parent), *compiler, version.stdout,
             *_flags(), sys.version, *_python_headers(), platform.machine(), info.get('model name', ''),
             info.get('flags', info.get('Features', ''))]
    parts += [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in ('.h', '.cc')]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]


def _last_line(text):
    """The most telling line of a compiler's output: the first error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if 'error' in line), lines[-1] if lines else 'no message')


def _cache_dir():
    """A folder that only this user can write to: the cache, or a temporary folder where the cache is not writable."""
    root = os.environ.get('LARGE_KERNEL_CACHE_DIR')
    base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    fallback = Path(tempfile.gettempdir()) / f'replknet_paddle-{os.getuid()}'
    for folder in (Path(root) if root else Path(base) / 'replknet_paddle', fallback):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError:
            continue
        if folder != fallback or (folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022):
            return folder
    return Path(tempfile.mkdtemp(prefix='replknet_paddle-'))


@contextlib.contextmanager
def _locked(path):
    import fcntl
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command):
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BuildError(f'{command[0]} took longer than {TIMEOUT} s') from None
    if result.returncode:
        raise BuildError(f'{command[0]} failed: {_last_line(result.stderr)}')


def cached(name, make, description):
    """Path of the shared library `name` in the cache, which is made if it does not exist yet.

    Several processes may call this at once: one makes it, the others wait for it. It appears atomically.

    Args:
        make: function of (folder, library) that makes the library, with an empty folder for what it needs meanwhile.
        description: of the library, for the line on stderr.
    Raises:
        BuildError, OSError: it cannot be made.
    """
    library = _cache_dir() / name
    if library.exists():
        return library
    with _locked(library.with_suffix('.lock')):
        if not library.exists():
            start = time.time()
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                unfinished = Path(folder) / library.name
                make(folder, unfinished)
                os.replace(unfinished, library)
            print(f'large_kernel: built {description} in {time.time() - start:.1f} s: {library}', file=sys.stderr,
                  flush=True)
    return library


def library_path():
    """Path of the operator's shared library, which is built if it does not exist yet.

    Several processes may call this at once: one builds, the others wait for it.

    Raises:
        BuildError: it cannot be built.
    """
    if platform.system() != 'Linux':
        raise BuildError(f'the C++ operator is built on Linux only; this is {platform.system()}')

    def make(folder, library):
        for command in _commands(compiler, folder, library):
            _run(command)
    try:
        compiler = _compiler()
        return cached(f'large_kernel_{_key(compiler)}.so', make,
                      f'the C++ operator once for this machine with {compiler[0]}')
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(' '.join(str(error).split())) from None


_registered = None  # path of the library this process has registered, or the BuildError that prevented it
# The Python module inside the library (csrc/python_entry.h): accepts(x, weight, bias, stride) and, without gradients,
# forward(x, weight, bias, stride). None where the operator is not loaded or was built without Python's headers.
direct = None


def load_operator(path=None):
    """Registers the operator with Paddle in this process; required before running an exported program that uses it.

    Args:
        path: a library built elsewhere, for machines without a compiler (same Paddle, same kind of processor);
            None takes it from the cache or builds it.

    Returns:
        Path of the library.

    Raises:
        BuildError: the operator cannot be built or loaded.
    """
    global _registered, direct
    if isinstance(_registered, BuildError) and path is None:
        raise _registered
    if _registered is None or isinstance(_registered, BuildError):
        try:
            library = Path(path) if path else library_path()
            if not library.is_file():
                raise BuildError(f'{library} does not exist')
            register(library)
            _registered, direct = library, _direct_module(library)
        except BuildError as error:
            _registered = error
            raise
    return _registered


def register(library):
    """Registers the operators of a library with Paddle; raises BuildError if it cannot be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Paddle advises ccache
        from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op
    try:
        load_op_meta_info_and_register_op(str(library))
    except (OSError, RuntimeError, ValueError) as error:
        raise BuildError(f'{library} cannot be loaded: {_last_line(str(error))}') from None


def _direct_module(library):
    """The `direct` module inside a library, or None if it has none."""
    loader = importlib.machinery.ExtensionFileLoader('large_kernel_direct', str(library))
    try:
        return importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    except ImportError:
        return None


def instructions(precision):
    """The processor's instructions with which the operator multiplies in a precision on this machine.

    They need a processor that has them and a compiler that knows them, and AMX also needs Linux 5.16.

    Args:
        precision: 'bf16' or 'int8'.
    Returns:
        'AMX', 'AVX512_BF16', 'AVX512_VNNI' or 'AVX-VNNI'; None where products take several instructions of another
        kind, where there is no operator, and for libraries of versions that do not tell.
    """
    if reason_unavailable() is not None:
        return None
    ask = getattr(ctypes.CDLL(str(load_operator())), f'large_kernel_{precision}_instructions', None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    return ask().decode() or None


def reason_unavailable():
    """None if the operator is ready in this process (it is built if necessary), else the reason in one line."""
    try:
        load_operator()
    except BuildError as error:
        return str(error)
    return None
