"""Environment settings for Paddle, most of them for the CPU. Every script imports this module before paddle.

Paddle's x86-64 wheels bundle a 2019 version of MKL (libmklml) that uses slow code on processors not made by Intel: on
AMD processors, matrix products and 1x1 convolutions run at a third of their speed. MKL_DEBUG_CPU_TYPE=7 selects MKL's
AVX-512 code, 5 its AVX2 code. MKL reads the variable at its first call, so this also works after paddle was imported,
as long as no matrices have been multiplied yet.

Paddle's CPU allocator returns every freed activation to glibc, which by default returns large blocks to the kernel.
Each layer then takes page faults for the same memory again, which cost more than the computation of a batch norm or
ReLU. With the settings here, the process keeps freed memory.
"""
import ctypes
import importlib.util
import os
import platform
import sys
import warnings
import zlib  # noqa: F401 - Paddle 2.6 exports zlib's symbols; if zlib is loaded after it, Pillow's PNG codec fails
from pathlib import Path

VARIABLE = 'MKL_DEBUG_CPU_TYPE'
THREADS = 'OMP_NUM_THREADS'


def paddle_launcher():
    """The process id of Paddle's launcher if it started this process, else 0; Linux only."""
    parent = os.getppid()
    try:
        command = Path(f'/proc/{parent}/cmdline').read_bytes()
    except OSError:
        return 0
    started = 'PADDLE_TRAINER_ID' in os.environ and (b'paddle.distributed' in command or b'fleetrun' in command)
    return parent if started else 0


def _users_threads():
    """OMP_NUM_THREADS as the user has set it, or None. Importing paddle sets it to 1, in Paddle's launcher as well."""
    if 'paddle' in sys.modules:
        return None
    launcher = os.environ.get(THREADS) == '1' and paddle_launcher()
    try:
        if launcher and f'\0{THREADS}='.encode() not in b'\0' + Path(f'/proc/{launcher}/environ').read_bytes():
            return None  # that file has the variables with which the launcher was started
    except OSError:
        pass
    return os.environ.get(THREADS)


_USER_THREADS = _users_threads()


def cpu_info(path='/proc/cpuinfo'):
    """The first processor's fields in /proc/cpuinfo; {} where that file does not exist."""
    try:
        first = Path(path).read_text().split('\n\n')[0]
    except OSError:
        return {}
    pairs = (line.partition(':')[::2] for line in first.splitlines())
    return {key.strip(): value.strip() for key, value in pairs}


def _bundles_old_mkl():
    spec = importlib.util.find_spec('paddle')
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / 'libs' / 'libmklml_intel.so').exists() for folder in folders or ())


def _configure_mkl():
    if VARIABLE in os.environ:
        return f'{VARIABLE}={os.environ[VARIABLE]} from the environment'
    if platform.system() != 'Linux' or platform.machine() != 'x86_64':
        return f'{VARIABLE} left alone: not x86-64 Linux'
    info = cpu_info()
    flags = set(info.get('flags', '').split())
    code = '7' if 'avx512f' in flags else '5' if {'avx2', 'fma'} <= flags else None
    if info.get('vendor_id') not in ('AuthenticAMD', 'HygonGenuine') or code is None:
        return f'{VARIABLE} left alone: not an AMD processor with AVX2'
    if not _bundles_old_mkl():
        return f'{VARIABLE} left alone: this Paddle does not bundle libmklml'
    os.environ[VARIABLE] = code
    return f'{VARIABLE}={code} set: full-speed matrix products on this AMD processor'


def _configure_malloc():
    settings = 'MALLOC_MMAP_MAX_', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'GLIBC_TUNABLES'
    if any(name in os.environ for name in settings):
        return 'malloc as set by the user'
    if platform.libc_ver()[0] != 'glibc':
        return 'malloc left alone: not glibc'
    mallopt = ctypes.CDLL(None).mallopt
    # M_MMAP_MAX 0: no block gets its own mapping, which would be released when it is freed; M_TRIM_THRESHOLD -1: the
    # heap never shrinks. A preloaded replacement for malloc returns 0.
    accepted = mallopt(-4, 0) and mallopt(-1, -1)
    return 'malloc keeps freed memory' if accepted else 'malloc left alone: it does not accept settings'


_MESSAGE = f'{_configure_mkl()}; {_configure_malloc()}'

for _name in ('CUDA_VISIBLE_DEVICES', 'XPU_VISIBLE_DEVICES'):
    if ' ' in os.environ.get(_name, ''):  # CUDA accepts "2, 3"; Paddle's start of several processes does not
        os.environ[_name] = os.environ[_name].replace(' ', '')

# Paddle's informational messages would bury the lines that matter; warnings and errors are still shown, but not the
# warnings of ranks, which only repeat that a connection is lost.
_VERBOSITY = 'GLOG_minloglevel'
_QUIET = _VERBOSITY not in os.environ
if _QUIET:
    os.environ[_VERBOSITY] = '2' if 'PADDLE_TRAINER_ID' in os.environ else '1'
for _note in ('No ccache found', 'Your model will be trained under CPUONLY', 'When training, we now always track'):
    warnings.filterwarnings('ignore', message=_note)


def describe():
    """One line for the log: what was set, or why not."""
    if os.environ.get('OMP_PROC_BIND', 'false').lower() not in ('', 'false') or os.environ.get('OMP_PLACES'):
        return f"{_MESSAGE}; OMP_PROC_BIND or OMP_PLACES leaves Paddle's MKL one thread: bind with KMP_AFFINITY instead"
    return _MESSAGE


def prepare_ranks():
    """Sets the environment for ranks to start, without the OMP_NUM_THREADS that Paddle has set in this process."""
    os.environ.pop(THREADS, None)
    if _USER_THREADS is not None:
        os.environ[THREADS] = _USER_THREADS
    if _QUIET:
        os.environ[_VERBOSITY] = '2'


def set_threads(processes=1, threads=None):
    """Sets the number of threads of Paddle, MKL and the C++ operators in this process; Paddle's default is one.

    Args:
        processes: number of processes that share this machine's cores.
        threads: number of threads; None for the user's OMP_NUM_THREADS if it was set before paddle was imported, else
            an equal share of the cores this process may run on.

    Returns:
        The number of threads set.
    """
    from paddle.base import core
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = threads or int((_USER_THREADS or '0').split(',')[0]) or max(1, cores // processes)
    core.set_num_threads(threads)
    return threads
