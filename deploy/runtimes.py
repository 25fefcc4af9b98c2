"""Exported programs as functions on the CPU: images, float32 [N, 3, H, W], to logits [N, num_classes], or more."""
import contextlib
import ctypes
import os
import sys

from errors import UserError


def program_file(prefix):
    """The file of a program beside `prefix`.pdiparams: .json of Paddle 3, .pdmodel of 2.6."""
    for suffix in ('.json', '.pdmodel'):
        if os.path.isfile(prefix + suffix):
            return prefix + suffix
    raise FileNotFoundError(f'{prefix}.json: no such program')


def save_paddle_program(layer, prefix, size=None, implementation=None):
    """Traces an eval-mode layer for images [N, 3, H, W] into `prefix`.json or .pdmodel and `prefix`.pdiparams.

    Args:
        size: (H, W) pixels; None leaves both free.
        implementation: of the depthwise convolutions: 'custom', the large-kernel operator, or 'native'; None for what
            LARGE_KERNEL_CONV_IMPL says, and for its 'auto' for the operator where it can be had.
    """
    import paddle

    from large_kernel import build  # running a program of standard operators needs nothing of it
    from large_kernel.conv import VARIABLE
    before = os.environ.get(VARIABLE)
    if implementation is None and before in (None, '', 'auto'):
        implementation = 'native' if build.reason_unavailable() else 'custom'
    os.environ[VARIABLE] = implementation or before
    try:
        spec = paddle.static.InputSpec([None, 3, *(size or (None, None))], 'float32', 'images')
        paddle.jit.save(layer, prefix, input_spec=[spec])
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def load_paddle_program(prefix, threads=1):
    """Runs `prefix`.json or .pdmodel with Paddle Inference and oneDNN.

    A program that holds the large-kernel operator needs `large_kernel.load_operator()` before.
    """
    from paddle import inference
    config = inference.Config(program_file(prefix), prefix + '.pdiparams')
    config.disable_gpu()
    config.enable_mkldnn()
    config.set_cpu_math_library_num_threads(threads)
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    source = predictor.get_input_handle(predictor.get_input_names()[0])
    result = predictor.get_output_handle(predictor.get_output_names()[0])

    @_nothing_on_stdout()
    def run(images):
        source.copy_from_cpu(images)
        predictor.run()
        return result.copy_to_cpu()
    return run


@contextlib.contextmanager
def _nothing_on_stdout():
    """Standard output is for results, but Paddle's oneDNN tells there what it supports."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, 'w') as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C and C++ have not written yet
        os.dup2(kept, 1)
        os.close(kept)


def load_onnx_program(path, threads=1):
    """Runs an ONNX file with ONNX Runtime.

    Raises:
        UserError: there is no onnxruntime package here.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError('an ONNX file is checked with ONNX Runtime: pip install onnxruntime') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'images': images})[0]
