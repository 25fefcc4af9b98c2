"""Paddle Inference programs: written from a model, and run on the CPU with oneDNN."""
import contextlib
import ctypes
import os
import sys

import paddle
from paddle import inference

from errors import UserError
from large_kernel import extension

SUFFIXES = ('.json', '.pdmodel')  # of the graph, from Paddle 3 on and before


def save_program(layer, path, image_size, channels=3):
    """Traces `layer` in eval mode, for images [N, channels, image_size, image_size], into PATH.json and PATH.pdiparams.

    The program runs the large-kernel operator if the layer does.
    """
    layer.eval()
    shape = [None, channels, image_size, image_size]
    traced = paddle.jit.to_static(layer, input_spec=[paddle.static.InputSpec(shape, 'float32', 'images')],
                                  full_graph=True)
    paddle.jit.save(traced, path)


@contextlib.contextmanager
def _stdout_to_stderr():
    """Where Paddle tells what oneDNN supports; standard output is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


class Program:
    """A program of `save_program`, ready to run.

    Args:
        path: as in `save_program`.
        threads: for its computations.
    Raises:
        UserError: there is no such program.
    """

    def __init__(self, path, threads):
        graph = next((path + suffix for suffix in SUFFIXES if os.path.isfile(path + suffix)), None)
        if graph is None:
            raise UserError(f'{path}{SUFFIXES[0]}: no such program')
        if extension.reason_unavailable() is None:
            extension.load_operator()  # Paddle Inference does not know it otherwise
        config = inference.Config(graph, path + '.pdiparams')
        config.disable_gpu()
        config.enable_mkldnn()
        config.set_cpu_math_library_num_threads(threads)
        config.disable_glog_info()
        with _stdout_to_stderr():
            self._predictor = inference.create_predictor(config)
        self._input = self._predictor.get_input_handle(self._predictor.get_input_names()[0])

    def __call__(self, images):
        """float32 [N, 3, H, W] -> list of the program's results, arrays."""
        self._input.copy_from_cpu(images)
        self._predictor.run()
        return [self._predictor.get_output_handle(name).copy_to_cpu() for name in self._predictor.get_output_names()]
