"""Times whole models: inference, training steps, and how they scale with batch size, image size and kernel size.

    pip install -r requirements-bench.txt
    python benchmarks/bench_model.py -output=results/model.csv
    python benchmarks/bench_model.py -cfg=configs/replknet_31l.yaml -suites=inference -systems=custom,torch

Every system runs each case in a new process, which also reports its peak memory. All systems have the same random
weights. `custom` is a model as it is built, `packed` as predict.py prepares it, `inference` as export.py writes it.

The suites are inference (merged form at batch 1 and 8, training form at batch 1), training (a step of AdamW, batch 4),
batch (merged, 1 to 16), size (merged, 224 to 1024 pixels) and kernel (merged, 3 to 51 in all stages). The image size is
that of the config file, except in the suite `size`.

Three more suites are measured only when named. rounded (merged, batch 1 and 8) and rounded-training (batch 4) compare
bfloat16 and int8 with float32: -bf16 and -int8 are this project's -precision and -amp, torch-bf16 is torch's autocast
with channels_last, and openvino-default is the precision that OpenVINO chooses, bfloat16 where the processor has it.
erf is the effective receptive field of an image of 1024 pixels, in `custom` as erf.py computes it, in the others by
plain differentiation with frozen weights.
"""
import argparse
import contextlib
import functools
import math
import os
import sys
import tempfile
import zlib

import harness
import numpy as np
from harness import ArgumentParser

_CUSTOM = {'LARGE_KERNEL_CONV_IMPL': 'custom', **harness.BOUND_PADDLE}
_NATIVE = {'LARGE_KERNEL_CONV_IMPL': 'native', **harness.BOUND_PADDLE}
FLOAT32 = {  # name: environment variables
    'custom': _CUSTOM,
    'fft': {'LARGE_KERNEL_CONV_IMPL': 'fft', **harness.BOUND_PADDLE},
    'native': _NATIVE,
    'stock': {**_NATIVE, **harness.STOCK_PADDLE},
    'packed': _CUSTOM,
    'inference': _CUSTOM,
    'inference-stock': {**_NATIVE, **harness.STOCK_PADDLE},
    'torch': harness.BOUND,
    'torch-channels-last': harness.BOUND,
    'onnxruntime': {},
    'openvino': {},
}
ROUNDED = {
    'custom-bf16': _CUSTOM,
    'inference-bf16': _CUSTOM,
    'inference-int8': _CUSTOM,
    'torch-bf16': harness.BOUND,
    'openvino-default': {},
}
SYSTEMS = {**FLOAT32, **ROUNDED}
GROWTH = ('batch', 'size', 'kernel')
PARTICIPANTS = {  # suite: systems
    'inference': tuple(FLOAT32),
    'training': ('custom', 'fft', 'stock', 'torch', 'torch-channels-last'),
    **dict.fromkeys(GROWTH, ('custom', 'inference', 'torch-channels-last', 'openvino')),
    'rounded': ('inference', 'inference-bf16', 'inference-int8', 'torch-bf16', 'openvino', 'openvino-default'),
    'rounded-training': ('custom', 'custom-bf16', 'torch-channels-last', 'torch-bf16'),
    'erf': ('custom', 'stock', 'torch-channels-last'),
}
WHEN_NAMED = ('rounded', 'rounded-training', 'erf')
TOLERANCE = {**dict.fromkeys(GROWTH), **dict.fromkeys(('rounded', 'rounded-training'), 0.5)}  # other suites: 2e-3


def cases_of(suite, config):
    """The cases of a suite for a model's settings."""
    model = config.MODEL
    base = {'suite': suite, 'merged': True, 'batch': 1, 'size': config.DATA.IMAGE_SIZE,
            'kernels': list(model.LARGE_KERNEL_SIZES)}
    return {
        'inference': [base, {**base, 'batch': 8}, {**base, 'merged': False}],
        'training': [{**base, 'merged': False, 'batch': 4}],
        'rounded': [base, {**base, 'batch': 8}],
        'rounded-training': [{**base, 'merged': False, 'batch': 4}],
        'batch': [{**base, 'batch': batch} for batch in (1, 2, 4, 8, 16)],
        'size': [{**base, 'size': size} for size in (224, 384, 512, 768, 1024)],
        'erf': [{**base, 'size': 1024}],
        'kernel': [{**base, 'kernels': [kernel] * len(model.LAYERS)} for kernel in (3, 7, 13, 21, 31, 41, 51)],
    }[suite]


# ---- the systems: functions of a case and a folder with the exported model that return (function to time, version);
# the function to time returns the list of its results

def random_weights(name, shape):
    """Weights that depend only on name and shape: uniform in +-1/sqrt(fan in); 1 for norm weights, 0 for biases."""
    if len(shape) == 1:
        return np.full(shape, name.endswith(('norm.weight', 'bn.weight')), np.float32)
    weights = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32)
    return (weights * 2 - 1) / np.float32(math.sqrt(np.prod(shape[1:])))


def images_and_labels(case):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((case['batch'], 3, case['size'], case['size']), dtype=np.float32)
    return images, rng.integers(0, case['model']['num_classes'], case['batch'])


def paddle_model(case):
    paddle = harness.import_paddle(case['threads'])
    from replknet import RepLKNet
    small_kernel = {'small_kernel': 0} if case['merged'] else {}
    model = RepLKNet(**{**case['model'], **small_kernel}, merged=case['merged'])
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient:
            transposed = name == 'head.weight'
            weights = random_weights(name, parameter.shape[::-1] if transposed else parameter.shape)
            parameter.set_value(weights.T if transposed else weights)
    return paddle, model


def packed(model, case, precision='fp32'):
    """The model as predict.py and export.py prepare it; in int8 with the ranges of the case's images."""
    from fuse import fuse, pack
    from large_kernel import fastest_precision
    from large_kernel.quantise import quantise
    model, quantised = fuse(model) if case['merged'] else model, None
    if precision == 'int8':
        precision, quantised = fastest_precision(), quantise(model, [images_and_labels(case)[0]])
    return pack(model, precision, quantised)


def paddle_dynamic(case, folder, prepare=lambda model, case: model, bf16=False):
    paddle, model = paddle_model(case)
    images, labels = map(paddle.to_tensor, images_and_labels(case))
    version = f'paddlepaddle {paddle.__version__}'
    if case['suite'] == 'erf':
        return paddle_field(model, images), version
    if 'training' not in case['suite']:
        model.eval()
        model = prepare(model, case)

        def infer():
            with paddle.no_grad():
                return [model(images).numpy()]
        return infer, version
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters(), weight_decay=0.05)

    from large_kernel import bf16_products

    def step():
        with bf16_products(bf16):
            loss = paddle.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return [loss.numpy()]
    return step, version


def paddle_field(model, images):
    """Function that computes the effective receptive field of the last stage."""
    from paddle import nn

    from evaluation.receptive_field import contributions, stage_layers
    from fuse import fuse
    last = len(model.stages) - 1
    if os.environ['LARGE_KERNEL_CONV_IMPL'] == 'custom':
        layers = stage_layers(fuse(model), last)
    else:
        layers = [nn.Sequential(*stage_layers(model, last))]
    return lambda: profiles(contributions(layers, images[0].numpy()))


def profiles(field):
    """The sums of a map over its rows and over its columns: systems are compared on 64 values of each."""
    return [field.sum(0), field.sum(1)]


def paddle_packed(case, folder):
    return paddle_dynamic(case, folder, packed)


def export_paddle(case, folder, precision='fp32'):
    _, model = paddle_model(case)
    from deploy.runtimes import save_paddle_program
    model.eval()
    implementation = os.environ['LARGE_KERNEL_CONV_IMPL']
    if implementation == 'custom':
        model = packed(model, case, precision)
    save_paddle_program(model, os.path.join(folder, 'model'), (case['size'], case['size']), implementation)


def paddle_inference(case, folder):
    paddle = harness.import_paddle(case['threads'])
    from deploy.runtimes import load_paddle_program
    from large_kernel.build import load_operator
    if os.environ['LARGE_KERNEL_CONV_IMPL'] == 'custom':
        load_operator()  # registers the operator with Paddle Inference
    program = load_paddle_program(os.path.join(folder, 'model'), case['threads'])
    images, _ = images_and_labels(case)
    return lambda: [program(images)], f'paddlepaddle {paddle.__version__}'


def torch_model(case):
    import torch
    from torch_replknet import RepLKNet
    with torch.device('meta'):
        model = RepLKNet(**case['model'], merged=case['merged'])
    model.to_empty(device='cpu')
    model.load_state_dict({name: torch.from_numpy(random_weights(name, tuple(value.shape)))
                           for name, value in model.named_parameters()}, strict=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    return torch, model


def torch_eager(case, folder, channels_last=False, bf16=False):
    torch, model = torch_model(case)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, labels = map(torch.from_numpy, images_and_labels(case))
    images, model = images.contiguous(memory_format=layout), model.to(memory_format=layout)
    version = f'torch {torch.__version__}'
    if case['suite'] == 'erf':
        model.eval().requires_grad_(False)
        images.requires_grad_(True)

        def field():
            x = model.forward_features(images)[-1]
            centre = torch.relu(x[:, :, x.shape[2] // 2, x.shape[3] // 2]).sum()
            gradient, = torch.autograd.grad(centre, images)
            return profiles(torch.relu(gradient).sum((0, 1)).numpy())
        return field, version
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=bf16)
    if 'training' not in case['suite']:
        model.eval()

        def infer():
            with torch.inference_mode(), autocast:
                return [model(images).float().numpy()]
        return infer, version
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)

    def step():
        with autocast:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach().numpy()]
    return step, version


def torch_channels_last(case, folder):
    return torch_eager(case, folder, channels_last=True)


def export_onnx(case, folder):
    torch, model = torch_model(case)
    images, _ = images_and_labels(case)
    torch.onnx.export(model.eval(), (torch.from_numpy(images),), os.path.join(folder, 'model.onnx'), dynamo=False)


def onnxruntime_model(case, folder):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case['threads']
    session = onnxruntime.InferenceSession(os.path.join(folder, 'model.onnx'), options,
                                           providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: images_and_labels(case)[0]}
    return lambda: session.run(None, feed), f'onnxruntime {onnxruntime.__version__}'


def openvino_model(case, folder, precision='f32'):
    import openvino
    settings = harness.openvino_settings(case, precision)
    compiled = openvino.compile_model(os.path.join(folder, 'model.onnx'), 'CPU', settings)
    request = compiled.create_infer_request()
    images, _ = images_and_labels(case)

    def infer():
        request.infer({0: images}, share_inputs=True)
        return [request.get_output_tensor().data]
    return infer, f'openvino {openvino.__version__.split("-")[0]}'


MAKERS = {'packed': paddle_packed, 'inference': paddle_inference, 'inference-stock': paddle_inference,
          'torch': torch_eager, 'torch-channels-last': torch_channels_last, 'onnxruntime': onnxruntime_model,
          'openvino': openvino_model, 'inference-bf16': paddle_inference, 'inference-int8': paddle_inference,
          'custom-bf16': functools.partial(paddle_dynamic, bf16=True),
          'torch-bf16': functools.partial(torch_eager, channels_last=True, bf16=True),
          'openvino-default': functools.partial(openvino_model, precision=None)}
EXPORTERS = {'inference': export_paddle, 'inference-stock': export_paddle, 'onnxruntime': export_onnx,
             'openvino': export_onnx, 'openvino-default': export_onnx,
             'inference-bf16': functools.partial(export_paddle, precision='bf16'),
             'inference-int8': functools.partial(export_paddle, precision='int8')}


def child(name, folder, export):
    """Exports the model of a system into a folder, or runs the system, in this process."""

    def make(case):
        if export:
            EXPORTERS[name](case, folder)
            return list, {}
        run, version = MAKERS.get(name, paddle_dynamic)(case, folder)
        return run, {'version': version}

    harness.serve(make)


# ---- the parent

def start(name, case, arguments, stack):
    """Starts the process of a system; if it needs a file, another process exports the model first.

    The `stack` closes the process and removes the file.
    """
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    command = [__file__, f'-child={name}', f'-folder={folder}']
    if name in EXPORTERS:
        exporter = harness.System(name, [*command, '-export'], arguments.threads, SYSTEMS[name])
        with contextlib.closing(exporter):
            exporter.ask(setup=case)
    system = harness.System(name, command, arguments.threads, SYSTEMS[name])
    stack.callback(system.close)
    return system


def groups_of(suites, names, config):
    """Yields lists of (system, case) to measure together.

    They are all systems of one case; in the suites of GROWTH, all cases of one system.
    """
    for suite in suites:
        systems = [name for name in names if name in PARTICIPANTS[suite]]
        cases = cases_of(suite, config)
        if suite in GROWTH:
            yield from ([(name, case) for case in cases] for name in systems)
        else:
            yield from ([(name, case) for name in systems] for case in cases)


def bench(suites, names, config, arguments):
    """Measures the cases of the suites; yields (row of the results, version of its system)."""
    for group in groups_of(suites, names, config):
        cases = {f'{name}, ' + ', '.join(f'{field} {value}' for field, value in case.items()): (name, case)
                 for name, case in group}
        times, answers, failed = measure_group(cases, config.MODEL, arguments)
        for key, reason in failed.items():
            print(f'{key}: left out: {reason}', file=sys.stderr)
        for key, values in times.items():
            name, case = cases[key]
            row = {'system': name, **case, 'kernels': ' '.join(map(str, case['kernels'])), **harness.summary(values)}
            row['images_per_s'] = round(case['batch'] / row['median_ms'] * 1000, 3)
            row['peak_mb'] = round(answers[key]['peak_mb'])
            print(f'{key}: {row["median_ms"]:.4g} ms, {row["peak_mb"]} MB', file=sys.stderr)
            yield row, answers[key]['version']


def measure_group(cases, model, arguments):
    """Times a group of cases together, see `harness.measure`.

    Args:
        cases: {key: (system, case)}.
        model: settings of the model, MODEL.
    """
    jobs, failed = {}, {}
    suite, = {case['suite'] for _, case in cases.values()}
    with contextlib.ExitStack() as stack:
        for key, (name, case) in cases.items():
            request = {**case, 'threads': arguments.threads, 'model': {
                'large_kernel_sizes': case['kernels'], 'layers': model.LAYERS, 'channels': model.CHANNELS,
                'small_kernel': model.SMALL_KERNEL or 0, 'dw_ratio': model.DW_RATIO, 'ffn_ratio': model.FFN_RATIO,
                'num_classes': model.NUM_CLASSES}}
            try:
                jobs[key] = start(name, request, arguments, stack), request
            except harness.SystemFailed as error:
                failed[key] = str(error)
        times, answers, reasons = harness.measure(jobs, arguments.rounds, arguments.budget, arguments.patience,
                                                  tolerance=TOLERANCE.get(suite, 2e-3))
    return times, answers, {**failed, **reasons}


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    for flag, default, text in (
            ('cfg', os.path.join(harness.ROOT, 'configs', 'replknet_31b.yaml'), 'config file of the model'),
            ('suites', ','.join(suite for suite in PARTICIPANTS if suite not in WHEN_NAMED), 'suites to measure'),
            ('systems', ','.join(SYSTEMS), 'systems to time; those that are not installed are left out'),
            ('threads', 2, 'threads of each system, bound to cores'),
            ('rounds', 7, 'interleaved rounds; 0 takes the time of the first call'),
            ('budget', 10.0, 'seconds per case for a slow system; it is timed at least twice'),
            ('patience', 60.0, 'seconds to wait, per case, until other processes leave the cores idle'),
            ('output', '', 'CSV file to write')):
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, type=type(default), help=f'{text} (%(default)s)')
    for flag in ('child', 'folder'):
        parser.add_argument(f'-{flag}', help=argparse.SUPPRESS)
    parser.add_argument('-export', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder, arguments.export)
        return
    from config import get_config
    config = get_config(arguments.cfg)
    results = bench(harness.choose('suites', arguments.suites, PARTICIPANTS),
                    harness.choose('systems', arguments.systems, SYSTEMS), config, arguments)
    harness.report(results, arguments, print_results, model=config.MODEL.NAME)


def print_results(rows):
    """Prints the rows as a table."""
    columns = [name for name in rows[0] if name not in ('min_ms', 'calls')]
    print('\n' + harness.table(columns, [[row[name] for name in columns] for row in rows]))


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
