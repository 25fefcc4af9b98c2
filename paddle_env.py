"""What must be set before Paddle loads or first multiplies. Every script imports it before paddle.

Paddle's x86-64 wheels bundle an MKL of 2019 (libmklml) that sends every processor not made by Intel down a slow path:
matrix products and 1x1 convolutions run at a third of their speed on an AMD processor with AVX-512. Type 7 selects
MKL's AVX-512 code. MKL reads the variable at its first call, so it also works if paddle is imported already, as long
as nothing has been multiplied yet.

Paddle's CPU allocator hands every freed activation back to glibc, which by default returns large blocks to the kernel;
each layer then pays page faults for the same memory again, more than the layer's own work in batch normalisation or
ReLU. Here freed memory stays with the process.
"""
import ctypes
import importlib.util
import os
import platform
import sys
import warnings
import zlib  # noqa: F401 - Paddle 2.6 exports zlib's symbols; loaded after them, Pillow's PNG codec fails
from pathlib import Path

VARIABLE = 'MKL_DEBUG_CPU_TYPE'
_USER_THREADS = None if 'paddle' in sys.modules else os.environ.get('OMP_NUM_THREADS')  # paddle's import writes 1 there


def cpu_info(path='/proc/cpuinfo'):
    """The first processor's fields of /proc/cpuinfo, {} where there is none."""
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
    if info.get('vendor_id') not in ('AuthenticAMD', 'HygonGenuine') or 'avx512f' not in info.get('flags', '').split():
        return f'{VARIABLE} left alone: not an AMD processor with AVX-512'
    if not _bundles_old_mkl():
        return f'{VARIABLE} left alone: this Paddle does not bundle libmklml'
    os.environ[VARIABLE] = '7'
    return f'{VARIABLE}=7 set: full-speed matrix products on this AMD processor'


def _configure_malloc():
    settings = 'MALLOC_MMAP_MAX_', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'GLIBC_TUNABLES'
    if any(name in os.environ for name in settings):
        return 'malloc as set by the user'
    if platform.libc_ver()[0] != 'glibc':
        return 'malloc left alone: not glibc'
    mallopt = ctypes.CDLL(None).mallopt
    # M_MMAP_MAX: no block of its own mapping, which would end with it; M_TRIM_THRESHOLD: the heap never shrinks.
    # Another allocator that is preloaded answers 0.
    done = mallopt(-4, 0) and mallopt(-1, -1)
    return 'malloc keeps freed memory' if done else 'malloc left alone: it refuses settings'


_MESSAGE = f'{_configure_mkl()}; {_configure_malloc()}'

# Paddle's notes about itself, which bury the lines that matter; warnings and errors still show.
os.environ.setdefault('GLOG_minloglevel', '1')
for _note in ('No ccache found', 'Your model will be trained under CPUONLY', 'When training, we now always track'):
    warnings.filterwarnings('ignore', message=_note)


def describe():
    """One line for the log: what was set, or why nothing was."""
    if os.environ.get('OMP_PROC_BIND', 'false').lower() not in ('', 'false') or os.environ.get('OMP_PLACES'):
        return f"{_MESSAGE}; OMP_PROC_BIND or OMP_PLACES leaves Paddle's MKL one thread: bind with KMP_AFFINITY instead"
    return _MESSAGE


def set_threads(processes=1, threads=None):
    """Let Paddle, MKL and the operators of this process use the processor's cores; without it Paddle uses one.

    Args:
        processes: how many processes share this machine's cores.
        threads: threads of this process; None takes OMP_NUM_THREADS where the user has set it before paddle was
            imported, else an equal share of the cores this process may run on.

    Returns:
        The number of threads set.
    """
    from paddle.base import core
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = threads or int((_USER_THREADS or '0').split(',')[0]) or max(1, cores // processes)
    core.set_num_threads(threads)
    return threads
