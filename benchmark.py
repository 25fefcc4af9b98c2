"""Measures the speed of a model on this machine's CPU, in each form, backend and precision, and where the time goes.

    python benchmark.py -model=replknet_31b -image_size=224 -batch_size=1,8 -form=training,merged,fused \\
        -backend=dygraph,inference -threads=1,2 -output=31b.json

Every combination runs in a new process, one after the other, on random inputs. The shares of the time come from
Paddle's profiler, in three additional calls with an operator for each convolution. The share of a convolution includes
the norm or activation that is computed with it; `other` includes the time between operators.
"""
import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import tempfile

import numpy as np

from atomic_file import atomic_file
from benchmarks import harness
from deploy.layout import FORMS, PRECISIONS
from errors import ArgumentParser, UserError

BACKENDS = ('dygraph', 'inference')
KINDS = ('pointwise', 'large depthwise', 'small depthwise', 'dense conv', 'norm', 'activation', 'other')
LARGE_FROM = 7  # kernel size of a large kernel
PROFILED_CALLS = 3
FUSED = 'fused convolution'  # name of its events in the profile
PERCENTILES = (50, 90, 99)


# ---- the child: the process of one combination

def build(case):
    """The model of a case, in the form of the case."""
    paddle = harness.import_paddle(case['threads'])
    from config import get_config
    from deploy.predictor import load_model
    from fuse import in_form, pack
    from large_kernel import fastest_precision, operator_in_use
    from large_kernel.quantise import quantise
    from replknet import VARIANTS, RepLKNet, build_replknet
    name = case['model']
    paddle.seed(0)
    if name in VARIANTS:
        model = RepLKNet(**VARIANTS[name])
    elif name.endswith(('.yaml', '.yml')):
        model = build_replknet(get_config(name))
    else:
        model, _ = load_model(name)
    model.eval()
    model, precision, quantised = in_form(model, case['form']), case['precision'], None
    if precision != 'fp32' and not operator_in_use():
        raise UserError(f'{precision} needs the C++ operator')
    if precision == 'int8':  # for speed only: nothing is learnt about accuracy on random inputs
        if case['form'] != 'fused':
            raise UserError('int8 needs the fused form')
        precision, quantised = fastest_precision(), quantise(model, [images_of(case)])
    if operator_in_use() and (case['backend'] == 'inference' or case['form'] == 'fused' or precision != 'fp32'):
        pack(model, precision, quantised)  # as export.py and predict.py do
    return model


def images_of(case):
    shape = (case['batch'], 3, case['size'], case['size'])
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@contextlib.contextmanager
def marked(kinds):
    """Adds the kind of each convolution that a model computes to `kinds`, and marks fused ones for a profile."""
    from paddle.profiler import RecordEvent

    from large_kernel import each_convolution

    def around(conv, fused):
        kernel = conv._kernel_size[0]
        if conv._groups > 1:
            kinds.append('large depthwise' if kernel >= LARGE_FROM else 'small depthwise')
        else:
            kinds.append('pointwise' if kernel == 1 else 'dense conv')
        return RecordEvent(FUSED) if fused else contextlib.nullcontext()

    with each_convolution(around):
        yield


def time_shares(run, kinds=None):
    """Shares of the time of a function by kind of layer.

    Args:
        run: function to profile.
        kinds: kinds of its convolutions, in the order of computation; None in dygraph, where `marked` finds them.
    Returns:
        {kind: share} for KINDS, or {} if Paddle's profiler does not provide them.
    """
    found = []
    from paddle.profiler import Profiler, ProfilerTarget
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'trace.json')
        try:
            with marked(found), Profiler(targets=[ProfilerTarget.CPU],
                                         on_trace_ready=lambda profiler: profiler.export(path)):
                for _ in range(PROFILED_CALLS):
                    run()
        except OSError:  # Paddle 2.6 for GPUs, where there is no driver
            return {}
        with open(path) as file:
            events = json.load(file)['traceEvents']
    return _shares(events, found or kinds * PROFILED_CALLS)


def _shares(events, kinds):
    """`time_shares` from the events of a trace and the kinds of all convolutions in it."""
    total, end, convolutions, shares = 0.0, 0.0, iter(kinds), dict.fromkeys(KINDS, 0.0)
    for event in sorted((e for e in events if e.get('ph') == 'X'), key=lambda e: float(e['ts'])):
        name, start, duration = event['name'].split('[')[0].lower(), float(event['ts']), float(event['dur'])
        if event['cat'] == 'ProfileStep':
            total += duration
        # Nested events are skipped. In dygraph a custom operator has no event of its own, but its layer or mark has.
        if start + duration <= end or not (event['cat'] == 'Operator' or name in (FUSED, 'conv2d', 'depthwiseconv2d')):
            continue
        end = start + duration
        if 'conv' in name:
            kind = next(convolutions, None)
        else:
            kind = ('norm' if 'norm' in name else 'activation' if re.search('relu|gelu', name) else 'other')
        if kind is None:
            return {}
        shares[kind] += duration
    if total == 0 or next(convolutions, None) is not None:
        return {}
    shares['other'] += total - sum(shares.values())
    return {kind: round(share / total, 4) for kind, share in shares.items()}


def load_program(path, threads):
    """Loads a program saved by `export_program`."""
    from deploy.runtimes import load_paddle_program
    from large_kernel.build import load_operator, reason_unavailable
    if reason_unavailable() is None:
        load_operator()  # registers the operator with Paddle Inference
    return load_paddle_program(path, threads)


def export_program(case, path):
    """Saves the model of a case as a Paddle program; answers with the shares of its time."""
    images, model, kinds = images_of(case), build(case), []
    from deploy.runtimes import save_paddle_program
    save_paddle_program(model, path, images.shape[2:])
    with marked(kinds):  # a second program, with an operator for each convolution
        save_paddle_program(model, path + '_apart', images.shape[2:])
    program = load_program(path + '_apart', case['threads'])
    program(images)
    return list, {'shares': time_shares(lambda: program(images), kinds)}


def prepare(case, path):
    """The function to time for a case, and what else to answer; `path` is the program for backend 'inference'."""
    images = images_of(case)
    if case['backend'] == 'inference':
        harness.import_paddle(case['threads'])
        program = load_program(path, case['threads'])
    else:
        model = build(case)
        from deploy.equivalence import dygraph_program
        program = dygraph_program(model)
    import paddle
    harness.reset_peak_memory()
    program(images)  # the first call is a warm-up
    shares = case['shares'] if case['backend'] == 'inference' else time_shares(lambda: program(images))
    return lambda: [program(images)], {'paddle': paddle.__version__, 'shares': shares}


def child(folder, export):
    """Exports or times one combination in this process; the exported program is in `folder`."""
    path = os.path.join(folder, 'model')
    harness.serve(lambda case: export_program(case, path) if export else prepare(case, path))


# ---- the parent

def bench(case, args):
    """Measures one combination.

    Returns:
        (row of the results, answer of the process).
    Raises:
        harness.SystemFailed: with the reason.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def start(*flags):
            system = harness.System(case['backend'], [os.path.abspath(__file__), '-child', folder, *flags],
                                    case['threads'], harness.BOUND_PADDLE)
            stack.callback(system.close)
            return system

        if case['backend'] == 'inference':
            exporter = start('-export')
            case = {**case, 'shares': exporter.ask(setup=case)['shares']}
            exporter.close()
        times, answers, failed = harness.measure({'model': (start(), case)}, rounds=3, budget=args.budget,
                                                 patience=args.patience, visit=args.budget / 3)
    if failed:
        raise harness.SystemFailed(failed['model'])
    answer, times = answers['model'], times['model']
    row = {name: case[name] for name in ('form', 'backend', 'precision', 'threads', 'size', 'batch')}
    row.update({f'p{p}_ms': round(float(np.percentile(times, p)), 3) for p in PERCENTILES})
    row.update(images_per_s=round(case['batch'] * 1000 / float(np.mean(times)), 3), calls=len(times),
               peak_mb=round(answer['peak_mb'] or 0), shares=answer['shares'], paddle=answer['paddle'])
    return row, answer


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])

    def add(flag, **options):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)

    def numbers(text):
        values = [int(value) for value in text.split(',')]
        if min(values) < 1:
            raise ValueError
        return values

    add('model', default='replknet_31b', help='variant or YAML file (with random weights), or zoo name, run folder or '
        'checkpoint')
    for flag, default in (('image_size', '224'), ('batch_size', '1'), ('threads', str(os.cpu_count()))):
        add(flag, type=numbers, default=default, metavar='N,...', help='whole numbers (%(default)s)')
    for flag, choices in (('form', FORMS), ('backend', BACKENDS)):
        add(flag, default=','.join(choices), metavar='X,...', help='any of %(default)s')
    add('precision', default='fp32', metavar='X,...', help=f'any of {",".join(PRECISIONS)} (%(default)s); bf16 needs a '
        'merged or fused form, int8 the fused one, calibrated on the random inputs')
    add('budget', type=float, default=10.0, help='seconds of timed calls for each combination, at most 300 calls')
    add('patience', type=float, default=30.0, help='seconds to wait, for each combination, until other processes '
        'leave the cores idle')
    add('output', help='JSON file of the results')
    add('child', help=argparse.SUPPRESS)
    add('export', action='store_true', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(args):
    """Measures all combinations of the arguments; yields a row of the results for each that could be measured."""
    forms, backends = harness.choose('form', args.form, FORMS), harness.choose('backend', args.backend, BACKENDS)
    precisions = harness.choose('precision', args.precision, PRECISIONS)
    answers = {}
    for size, batch, threads, form, backend, precision in itertools.product(
            args.image_size, args.batch_size, args.threads, forms, backends, precisions):
        case = {'model': args.model, 'form': form, 'backend': backend, 'precision': precision, 'threads': threads,
                'size': size, 'batch': batch}
        label = ', '.join(f'{name} {value}' for name, value in case.items() if name != 'model')
        print(label, file=sys.stderr)
        try:
            row, answer = bench(case, args)
        except harness.SystemFailed as error:
            print(f'{label}: left out: {error}', file=sys.stderr)
            continue
        same_input = answers.setdefault((size, batch, precision), {})
        same_input[label] = answer
        # in bfloat16 and int8, the forms round different weights
        if label in harness.disagreement(same_input, *() if precision == 'fp32' else (0.2,)):
            print(f'{label}: its results differ from those of {next(iter(same_input))}', file=sys.stderr)
        yield row


def print_results(header, rows):
    """Prints the header, a table of times and a table of the shares of the time."""
    for name, text in header.items():
        print(f'{name}: {text}')
    columns = [name for name in rows[0] if name not in ('shares', 'paddle')]
    print('\n' + harness.table(columns, [[row[name] for name in columns] for row in rows]))
    columns = columns[:6]  # the combination
    print(harness.table([*columns, *KINDS], [
        [*(row[name] for name in columns), *(f'{row["shares"][k]:.0%}' if row['shares'] else '-' for k in KINDS)]
        for row in rows]))


def main():
    args = read_arguments()
    if args.child:
        child(args.child, args.export)
        return
    header, load = {'model': args.model, **harness.describe_run(','.join(map(str, args.threads)))}, harness.Load()
    rows = []
    try:
        for row in measure(args):
            rows.append(row)
    finally:  # an interruption keeps the rows so far
        if rows:
            header = {**header, 'paddle': rows[0]['paddle'], **harness.describe_load(load)}
            if args.output:
                with atomic_file(args.output) as file:
                    file.write(json.dumps({**header, 'results': rows}, indent=1, allow_nan=False).encode())
            print_results(header, rows)
    if not rows:
        raise UserError('nothing was measured, see above')


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
