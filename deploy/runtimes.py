"""Saves models as Paddle programs, and loads Paddle and ONNX programs for the CPU.

A loaded program is a function of images, float32 [N, 3, H, W]. It returns logits [N, num_classes], or logits and
features [N, num_classes + C].
"""
import contextlib
import ctypes
import os
import sys

from errors import UserError


def program_file(prefix):
    """Path of the program that belongs to `prefix`.pdiparams: .json (Paddle 3) or .pdmodel (Paddle 2.6).

    Raises:
        FileNotFoundError: there is neither.
    """
    for suffix in ('.json', '.pdmodel'):
        if os.path.isfile(prefix + suffix):
            return prefix + suffix
    raise FileNotFoundError(f'{prefix}.json: no such program')


def save_paddle_program(layer, prefix, size=None, implementation=None):
    """Traces a layer in eval mode and saves it as `prefix`.json (or .pdmodel) and `prefix`.pdiparams.

    Args:
        layer: takes images [N, 3, H, W].
        size: (H, W) in pixels; None leaves both free.
        implementation: of the depthwise convolutions: 'custom' (the large-kernel operator) or 'native'. None uses
            LARGE_KERNEL_CONV_IMPL; if that is unset or 'auto', the operator where it is available.
    """
    import paddle

    from large_kernel import build  # not at the top: a program of standard operators runs without it
    from large_kernel.conv import VARIABLE
    before = os.environ.get(VARIABLE)
    if implementation is None and before in (None, '', 'auto'):
        implementation = 'native' if build.reason_unavailable() else 'custom'
    os.environ[VARIABLE] = implementation or before
    # no branch of the models depends on pixels: tracing is enough, without translating the source of every function
    # first, which takes several times as long and results in the same program
    paddle.jit.not_to_static(type(layer).forward)
    try:
        spec = paddle.static.InputSpec([None, 3, *(size or (None, None))], 'float32', 'images')
        paddle.jit.save(layer, prefix, input_spec=[spec])
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def load_paddle_program(prefix, threads=1):
    """Loads `prefix`.json (or .pdmodel) and `prefix`.pdiparams with Paddle Inference.

    For a program that contains the large-kernel operator, call `large_kernel.load_operator()` first.
    """
    from paddle import inference
    program = program_file(prefix)
    config = inference.Config(program, prefix + '.pdiparams')
    config.disable_gpu()
    onednn = needs_onednn(program)
    if onednn:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()  # Paddle 3 would enable it
    config.set_cpu_math_library_num_threads(threads)
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    images_handle = predictor.get_input_handle(predictor.get_input_names()[0])
    output_handle = predictor.get_output_handle(predictor.get_output_names()[0])

    quiet = onednn

    def run(images):
        nonlocal quiet
        images_handle.copy_from_cpu(images)
        with _silent_stdout() if quiet else contextlib.nullcontext():
            predictor.run()
        quiet = False
        return output_handle.copy_to_cpu()
    return run


def needs_onednn(program):
    """Whether oneDNN makes a program faster: where it computes convolutions. Beside this project's it only costs time.

    Args:
        program: path of a .json or .pdmodel file.
    """
    with open(program, 'rb') as file:
        content = file.read()
    # the type of an operator in JSON, and in a .pdmodel, a protocol buffer, with its tag and length
    convolutions = b'.conv2d"', b'.depthwise_conv2d"', b'\x1a\x06conv2d', b'\x1a\x10depthwise_conv2d'
    ours = b'fused_conv', b'large_kernel_conv'
    return any(name in content for name in convolutions) or not any(name in content for name in ours)


@contextlib.contextmanager
def _silent_stdout():
    """Discards what native code prints to standard output: Paddle 3 does in a program's first call with oneDNN."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, 'w') as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C and C++ may still hold the text in a buffer
        os.dup2(kept, 1)
        os.close(kept)


def load_onnx_program(path, threads=1):
    """Loads an ONNX file with ONNX Runtime.

    Raises:
        UserError: the onnxruntime package is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError('checking an ONNX file needs ONNX Runtime: pip install onnxruntime') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'images': images})[0]
