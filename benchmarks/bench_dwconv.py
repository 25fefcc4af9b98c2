"""Times depthwise convolutions: every implementation of `large_kernel`, and other frameworks if they are installed.

    pip install -r requirements-bench.txt
    python benchmarks/bench_dwconv.py -output=results/dwconv.csv
    python benchmarks/bench_dwconv.py -systems=custom,torch -shapes=my_shapes.txt -threads=1

GFLOP/s count only the taps inside the image, not those on padding. The share of the peak is relative to the
multiply-add peak of the same threads, which a loop in registers (fma_peak.cpp) measures in the same rounds.
"""
import argparse
import contextlib
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

import harness
import numpy as np
from harness import ArgumentParser, UserError

MODES = ('forward', 'training')
FIELDS = ('batch', 'channels', 'height', 'width', 'kernel', 'stride')
SYSTEMS = {  # name: environment variables
    'custom': {'LARGE_KERNEL_CONV_IMPL': 'custom', **harness.BOUND_PADDLE},
    'fft': {'LARGE_KERNEL_CONV_IMPL': 'fft', **harness.BOUND_PADDLE},
    'native': {'LARGE_KERNEL_CONV_IMPL': 'native', **harness.BOUND_PADDLE, **harness.STOCK_PADDLE},
    'torch': harness.BOUND,
    'torch-channels-last': harness.BOUND,
    'onnxruntime': {},
    'openvino': {},
}
FORWARD_ONLY = ('onnxruntime', 'openvino')


# ---- the systems: functions of a case, input, weight and output gradient (None: forward only) that return
# (function to time, version); the function to time returns the list of its results

def paddle_conv(case, x, weight, gradient):
    paddle = harness.import_paddle(case['threads'])
    from large_kernel import depthwise_conv2d
    x, weight = paddle.to_tensor(x), paddle.to_tensor(weight)
    version = f'paddlepaddle {paddle.__version__}'
    if gradient is None:
        return lambda: [depthwise_conv2d(x, weight, None, case['stride'])], version  # neither tensor requires gradients
    gradient = paddle.to_tensor(gradient)
    x.stop_gradient = weight.stop_gradient = False
    loss = paddle.zeros([1])

    class Next(paddle.autograd.PyLayer):
        """Passes the gradient on as a next layer would; backward(gradient) would copy it first, in one thread."""

        @staticmethod
        def forward(ctx, y):
            return loss

        @staticmethod
        def backward(ctx, _):
            return gradient

    def training():
        x.grad = weight.grad = None  # gradients of the previous call
        y = depthwise_conv2d(x, weight, None, case['stride'])
        Next.apply(y).backward()
        return [y, x.grad, weight.grad]
    return training, version


def torch_conv(case, x, weight, gradient, channels_last=False):
    import torch
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = (torch.from_numpy(a).contiguous(memory_format=layout) for a in (x, weight))

    def conv():
        return torch.nn.functional.conv2d(x, weight, None, case['stride'], case['kernel'] // 2, groups=case['channels'])

    version = f'torch {torch.__version__}'
    if gradient is None:
        return lambda: [conv()], version  # neither tensor requires gradients
    gradient = torch.from_numpy(gradient).contiguous(memory_format=layout)
    x.requires_grad_()
    weight.requires_grad_()

    def training():
        y = conv()
        return [y.detach(), *torch.autograd.grad(y, [x, weight], gradient)]
    return training, version


def torch_channels_last_conv(case, x, weight, gradient):
    return torch_conv(case, x, weight, gradient, channels_last=True)


def onnxruntime_conv(case, x, weight, gradient):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    node = helper.make_node('Conv', ['x', 'weight'], ['y'], group=case['channels'], strides=[case['stride']] * 2,
                            kernel_shape=[case['kernel']] * 2, pads=[case['kernel'] // 2] * 4)
    graph = helper.make_graph([node], 'conv', [helper.make_tensor_value_info('x', TensorProto.FLOAT, x.shape)],
                              [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(weight, 'weight')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case['threads']
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return lambda: session.run(None, {'x': x}), f'onnxruntime {onnxruntime.__version__}'


def openvino_conv(case, x, weight, gradient):
    import openvino
    from openvino import opset13
    border = [case['kernel'] // 2] * 2
    parameter = opset13.parameter(x.shape, np.float32)
    conv = opset13.group_convolution(parameter, opset13.constant(weight[:, None]), [case['stride']] * 2, border, border,
                                     [1, 1])
    compiled = openvino.compile_model(openvino.Model([conv], [parameter]), 'CPU', harness.openvino_settings(case))
    request = compiled.create_infer_request()

    def forward():
        request.infer({0: x}, share_inputs=True)
        return [request.get_output_tensor().data]
    return forward, f'openvino {openvino.__version__.split("-")[0]}'


MAKERS = {'torch': torch_conv, 'torch-channels-last': torch_channels_last_conv, 'onnxruntime': onnxruntime_conv,
          'openvino': openvino_conv}


def child(name, library):
    """Runs the system `name`, or `peak`, in this process."""

    def make(case):
        if name == 'peak':
            return peak(library, case['threads'])
        training = case['mode'] == 'training'
        rng = np.random.default_rng(0)
        outputs = [-(-case[side] // case['stride']) for side in ('height', 'width')]
        x, weight, gradient = (rng.standard_normal(shape, dtype=np.float32) for shape in (
            (case['batch'], case['channels'], case['height'], case['width']),
            (case['channels'], 1, case['kernel'], case['kernel']),
            (case['batch'], case['channels'], *outputs)))
        run, version = MAKERS.get(name, paddle_conv)(case, x, weight, gradient if training else None)
        return run, {'version': version}

    harness.serve(make)


def peak(library, threads):
    """The multiply-add loop of fma_peak.cpp, as a function to time, and its floating-point operations per call."""
    library = ctypes.CDLL(library)
    library.fma_peak.argtypes = library.flop_per_thread.argtypes = [ctypes.c_long]
    library.fma_peak.restype, library.flop_per_thread.restype = ctypes.c_float, ctypes.c_double
    steps = 100_000  # a fraction of a millisecond, so that most calls pass undisturbed

    def run():
        library.fma_peak(steps)
        return []
    return run, {'flop': library.flop_per_thread(steps) * threads}


# ---- the parent

def read_shapes(path):
    """Reads the cases of a file with lines `batch channels height width kernel stride [mode]`; # starts a comment.

    Raises:
        UserError: a line is not a case, or there is none.
    """
    cases = []
    with open(path, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            words = line.split('#')[0].split()
            if not words:
                continue
            try:
                sizes, modes = [int(word) for word in words[:6]], words[6:] or MODES
                if len(sizes) < 6 or min(sizes) < 1 or not set(modes) <= set(MODES) or sizes[4] % 2 == 0:
                    raise ValueError
            except ValueError:
                raise UserError(f'{path}, line {number}: expected "batch channels height width kernel stride '
                                f'[forward|training]", kernel odd, found "{line.strip()}"') from None
            cases += [{'mode': mode, **dict(zip(FIELDS, sizes))} for mode in modes]
    if not cases:
        raise UserError(f'{path}: contains no shape')
    return cases


def useful_flop(case):
    """Floating-point operations of a case, without the taps on padding."""

    def taps(size):  # along one side, summed over all outputs
        reach = case['kernel'] // 2
        return sum(min(size, i + reach + 1) - max(0, i - reach) for i in range(0, size, case['stride']))

    forward = 2 * case['batch'] * case['channels'] * taps(case['height']) * taps(case['width'])
    return forward * (3 if case['mode'] == 'training' else 1)


def build_peak(folder):
    """Compiles fma_peak.cpp; returns the path of the library, or None after a message on standard error."""
    source, library = os.path.join(harness.FOLDER, 'fma_peak.cpp'), os.path.join(folder, 'fma_peak.so')
    compiler = next(filter(None, map(shutil.which, (os.environ.get('CXX', ''), 'g++', 'c++', 'clang++'))), None)
    if compiler is None:
        print('no C++ compiler found; the share of the peak is not measured', file=sys.stderr)
        return None
    done = subprocess.run([compiler, '-O3', '-march=native', '-fopenmp', '-shared', '-fPIC', source, '-o', library],
                          capture_output=True, text=True)
    if done.returncode:
        print(f'{compiler} cannot compile fma_peak.cpp; the share of the peak is not measured: '
              f'{done.stderr.splitlines()[0]}', file=sys.stderr)
        return None
    return library


def bench(names, cases, arguments):
    """Measures the cases; yields (row of the results, version of its system)."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        library = build_peak(folder)
        commands = {name: [__file__, f'-child={name}'] for name in names}
        if library:
            commands['peak'] = [__file__, '-child=peak', f'-library={library}']
        systems = {}
        for name, command in commands.items():
            systems[name] = harness.System(name, command, arguments.threads, SYSTEMS.get(name, harness.BOUND))
            stack.callback(systems[name].close)
        for case in cases:
            request = {**case, 'threads': arguments.threads}
            jobs = {name: (system, request) for name, system in systems.items()
                    if case['mode'] == 'forward' or name not in FORWARD_ONLY}
            times, answers, failed = harness.measure(jobs, arguments.rounds, arguments.budget, arguments.patience)
            shape = ' '.join(str(case[field]) for field in ('mode', *FIELDS))
            for name, reason in failed.items():
                print(f'{shape}: {name} left out: {reason}', file=sys.stderr)
            peak_gflops = None
            if 'peak' in times:
                peak_gflops = answers['peak']['flop'] / statistics.median(times.pop('peak')) / 1e6
            for name, values in times.items():
                row = {'system': name, **case, **harness.summary(values)}
                row['gflops'] = round(useful_flop(case) / row['median_ms'] / 1e6, 2)
                row['peak_gflops'] = round(peak_gflops, 1) if peak_gflops else ''
                row['share_of_peak'] = round(row['gflops'] / peak_gflops, 4) if peak_gflops else ''
                yield row, answers[name]['version']
            print(f'{shape}: ' + ', '.join(f'{name} {statistics.median(v):.3g} ms' for name, v in times.items()),
                  file=sys.stderr)


def print_results(rows, names):
    """Prints a table of the medians in ms, and one of the shares of the peak if they were measured."""
    for column, title, form in (('median_ms', 'ms', '{:.3g}'), ('share_of_peak', 'share of the peak', '{:.0%}')):
        table = {}
        for row in rows:
            if row[column] != '':
                shape = '{mode} {batch}x{channels}x{height}x{width} k{kernel} s{stride}'.format(**row)
                table.setdefault(shape, {})[row['system']] = form.format(row[column])
        if table:
            print(f'\n{title}:\n')
            print(harness.table(['shape', *names], [[shape, *(cells.get(name, '') for name in names)]
                                                    for shape, cells in table.items()]))


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    for flag, default, text in (
            ('shapes', os.path.join(harness.FOLDER, 'dwconv_shapes.txt'), 'file of shapes'),
            ('systems', ','.join(SYSTEMS), 'systems to time; those that are not installed are left out'),
            ('threads', 2, 'threads of each system, bound to cores'),
            ('rounds', 9, 'interleaved rounds'),
            ('budget', 3.0, 'seconds per shape for a slow system; it is timed at least twice'),
            ('patience', 10.0, 'seconds to wait, per shape, until other processes leave the cores idle'),
            ('output', '', 'CSV file to write')):
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, type=type(default), help=f'{text} (%(default)s)')
    parser.add_argument('-child', help=argparse.SUPPRESS)
    parser.add_argument('-library', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.library)
        return
    names = harness.choose('systems', arguments.systems, SYSTEMS)
    harness.report(bench(names, read_shapes(arguments.shapes), arguments), arguments,
                   lambda rows: print_results(rows, names))


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
