"""Build of the C++ operator on first use, into a per-user cache, and its registration with Paddle.

The library is keyed by everything it depends on (sources, Paddle, compiler, flags, processor), so a change of any of
them builds anew and machines that share a home directory do not share code. LARGE_KERNEL_CACHE_DIR moves the cache.
"""
import contextlib
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
OPERATORS = 3  # version of the operators' attributes and weights: programs exported with another one do not run


class BuildError(RuntimeError):
    """The operator cannot be built or loaded here; the message is one line that says why."""


def _compiler():
    """The C++ compiler as an argument list; CXX overrides, as in any build."""
    command = shlex.split(os.environ.get('CXX') or '') or [shutil.which('g++') or shutil.which('clang++') or 'g++']
    if not shutil.which(command[0]):
        raise BuildError(f'no C++ compiler: {command[0]} not found (install g++, or set CXX)')
    return command


def _flags():
    # -march=native picks AVX-512, AVX or SSE on x86, -mcpu=native the same on ARM. Products are added by fused
    # instructions. At -O3 GCC keeps fewer of the accumulators in registers.
    native = '-march=native' if platform.machine() in ('x86_64', 'AMD64', 'i686') else '-mcpu=native'
    return ['-O2', native, '-ffp-contract=fast', '-std=c++17', '-fPIC', '-w', '-D_GLIBCXX_USE_CXX11_ABI=1',
            '-DPADDLE_WITH_CUSTOM_KERNEL']


def _python_headers():
    """Options to find Python.h; none where it is not installed: then there is no `direct`."""
    folder = sysconfig.get_path('include')
    return ['-I', folder] if os.path.exists(os.path.join(folder, 'Python.h')) else []


def _commands(compiler, folder, library):
    """The compile and the link command."""
    include, libs = Path(paddle.sysconfig.get_include()), Path(paddle.sysconfig.get_lib())
    core = libs.parent / 'base'
    # Paddle's own OpenMP runtime where it brings one: a second one would fight it for the cores.
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
    """The line of a compiler's output that says most: the first error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if 'error' in line), lines[-1] if lines else 'no message')


def _cache_dir():
    """A writable folder only this user can write to: the cache, or a temporary folder where it cannot be used."""
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


def _build(compiler, library):
    """Several processes may come here at once: one builds, the others wait and find the library."""
    start = time.time()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        for command in _commands(compiler, folder, unfinished):
            _run(command)
        os.replace(unfinished, library)
    print(f'large_kernel: built the C++ operator once for this machine with {compiler[0]} in '
          f'{time.time() - start:.1f} s: {library}', file=sys.stderr, flush=True)


def library_path():
    """Path of the operator's shared library, built if need be. Raises BuildError."""
    if platform.system() != 'Linux':
        raise BuildError(f'the C++ operator is built on Linux only, this is {platform.system()}')
    try:
        compiler = _compiler()
        library = _cache_dir() / f'large_kernel_{_key(compiler)}.so'
        if not library.exists():
            with _locked(library.with_suffix('.lock')):
                if not library.exists():
                    _build(compiler, library)
        return library
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(' '.join(str(error).split())) from None


_registered = None  # path of the library this process has registered, or the BuildError that prevented it

# The module of python_entry.h: serves(x, weight, bias, stride) and forward(x, weight, bias, stride), without gradients. None
# where the operator is not loaded or was built without Python's headers.
direct = None


def load_operator(path=None):
    """Register the operator with Paddle in this process: needed before an exported program that holds it is run.

    Args:
        path: a library built before, for machines without a compiler (same Paddle, same kind of processor);
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
            _register(library)
            _registered, direct = library, _direct_module(library)
        except BuildError as error:
            _registered = error
            raise
    return _registered


def _register(library):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Paddle advises ccache
        from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op
    try:
        load_op_meta_info_and_register_op(str(library))
    except (OSError, RuntimeError, ValueError) as error:
        raise BuildError(f'{library} cannot be loaded: {_last_line(str(error))}') from None


def _direct_module(library):
    """`direct` of a library, None if it has none."""
    loader = importlib.machinery.ExtensionFileLoader('large_kernel_direct', str(library))
    try:
        return importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    except ImportError:
        return None


def reason_unavailable():
    """None if the operator is ready in this process, after building it if need be, else one line that says why not."""
    try:
        load_operator()
    except BuildError as error:
        return str(error)
    return None


def run(x, weight, bias, stride, input_grad, weight_grad):
    """The depthwise operator itself: arguments as in `depthwise_conv2d`, all float32, on the CPU."""
    name = 'large_kernel_conv' if bias is None else 'large_kernel_conv_bias'
    tensors = _without_gradients([x, weight] if bias is None else [x, weight, bias])
    return _call(name, ('X', 'Filter', 'Bias'), tensors, ('stride', 'input_grad', 'weight_grad'),
                 [stride, input_grad, weight_grad])


def run_with_gradients(x, weight, bias, stride):
    """The same for what `direct` serves, where gradients are wanted."""
    if bias is None:
        return _RUN('large_kernel_conv', x, weight, stride, not x.stop_gradient, not weight.stop_gradient)[0]
    return _RUN('large_kernel_conv_bias', x, weight, bias, stride, not x.stop_gradient,
                not (weight.stop_gradient and bias.stop_gradient))[0]


def run_fused(x, weight, bias, residual, in_norm, out_norm, kernel, stride, activation, in_epsilon, out_epsilon,
              blocked, depthwise):
    """The operator of `fused.conv_block`; the norms are lists of weight, bias, mean and variance."""
    # by these suffixes Paddle knows inputs that may be missing, or are lists; it leaves out others without a word
    return _call('fused_conv', ('X', 'Filter', 'Bias@OPTIONAL', 'Residual@OPTIONAL', 'InNorm@VECTOR@OPTIONAL',
                                'OutNorm@VECTOR@OPTIONAL'), [x, weight, bias, residual, in_norm, out_norm],
                 ('kernel', 'stride', 'activation', 'in_epsilon', 'out_epsilon', 'blocked', 'depthwise'),
                 [kernel, stride, activation, in_epsilon, out_epsilon, blocked, depthwise])


def run_fused_sequence(x, parameters, kernels, strides, parts, residuals, activations, epsilons):
    """The operator of `deferred.computed`; the arguments are described in operator.cc. Not for tracing."""
    return _RUN('fused_convs', x, parameters, kernels, strides, parts, residuals, activations, epsilons)[0]


def run_batch_norm(x, weight, bias, mean, variance, momentum, epsilon, activation):
    """The operator of a batch norm in training; it moves the running mean and variance. Not for tracing."""
    tensors = _without_gradients([x, weight, bias, mean, variance])
    return _RUN('batch_norm_act', *tensors, momentum, epsilon, activation)[0]


_RUN = (paddle._C_ops if hasattr(paddle._C_ops, '_run_custom_op') else paddle.base.core.eager)._run_custom_op


def _without_gradients(tensors):
    """Detached under no_grad, which Paddle overlooks where an operator has a gradient: its result would hold them."""
    if not paddle.in_dynamic_mode() or paddle.is_grad_enabled():
        return tensors
    return [t if t.stop_gradient else t.detach() for t in tensors]


def _call(name, input_names, inputs, attribute_names, attributes):
    if paddle.in_dynamic_mode() or not isinstance(inputs[0], paddle.static.Variable):
        return _RUN(name, *inputs, *attributes)[0]
    from paddle.base.layer_helper import LayerHelper  # Paddle 2.6 traces into a program of operators
    helper = LayerHelper(name)
    y = helper.create_variable_for_type_inference(dtype=inputs[0].dtype)
    helper.append_op(type=name, inputs={k: v for k, v in zip(input_names, inputs) if v is not None}, outputs={'Out': y},
                     attrs=dict(zip(attribute_names, attributes)))
    return y
