"""How fast a model is on this machine's CPU, in each form and backend, and where the time goes.

    python benchmark.py -model=replknet_31b -image_size=224 -batch_size=1,8 -form=training,merged,fused \\
        -backend=dygraph,inference -threads=1,2 -output=31b.json

Every combination runs in a fresh process, one after the other, on made-up images. The shares of time come from Paddle's
profiler, over three more calls, on layers and operators: what is computed along with a convolution, such as its norm or
activation, counts there, and `other` is everything between the operators too.
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

from benchmarks import harness
from errors import ArgumentParser, UserError

FORMS = ('training', 'merged', 'fused')
BACKENDS = ('dygraph', 'inference')
KINDS = ('pointwise', 'large depthwise', 'small depthwise', 'dense conv', 'norm', 'activation', 'other')
LARGE_FROM = 7  # kernel size
PROFILED_CALLS = 3
FUSED = 'fused convolution'  # in the profile
PERCENTILES = (50, 90, 99)


# ---- the process of one combination

def build(case):
    """The model of a case in its form."""
    paddle = harness.import_paddle(case['threads'])
    from config import get_config
    from deploy.predictor import load_model
    from fuse import in_form, pack
    from large_kernel import operator_serves
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
    model = in_form(model, case['form'])
    if operator_serves() and (case['backend'] == 'inference' or case['form'] == 'fused'):
        pack(model)  # as export.py and predict.py do
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
    """Share of the time by KINDS, {} where Paddle's profiler does not tell.

    Args:
        run: function to profile.
        kinds: of its convolutions, in their order; None where `marked` can tell, in dygraph.
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
    total, end, convolutions, shares = 0.0, 0.0, iter(found or kinds * PROFILED_CALLS), dict.fromkeys(KINDS, 0.0)
    for event in sorted((e for e in events if e.get('ph') == 'X'), key=lambda e: float(e['ts'])):
        name, start, duration = event['name'].split('[')[0].lower(), float(event['ts']), float(event['dur'])
        if event['cat'] == 'ProfileStep':
            total += duration
        # those inside another are left out; in dygraph a custom operator has no event, but its layer or its mark
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


def child(folder, export):
    """Serves a combination, or exports its program into a folder, in this process."""

    def make(case):
        images, path = images_of(case), os.path.join(folder, 'model')
        if export:
            model = build(case)
            import paddle

            from deploy.runtimes import save_paddle_program
            save_paddle_program(model, path, images.shape[2:])
            kinds = []
            with marked(kinds), paddle.no_grad():
                model(paddle.to_tensor(images[:1]))
            return list, {'kinds': kinds}
        if case['backend'] == 'inference':
            harness.import_paddle(case['threads'])
            from deploy.runtimes import load_paddle_program
            from large_kernel.build import load_operator, reason_unavailable
            if reason_unavailable() is None:
                load_operator()  # else Paddle Inference does not know it
            program, kinds = load_paddle_program(path, case['threads']), case['kinds']
        else:
            model = build(case)
            from deploy.equivalence import dygraph_program
            program, kinds = dygraph_program(model), None
        import paddle
        harness.forget_peak_memory()
        program(images)  # the first call prepares
        return lambda: [program(images)], {'paddle': paddle.__version__,
                                           'shares': time_shares(lambda: program(images), kinds)}

    harness.serve(make)


# ---- the parent

def bench(case, args):
    """Measures a combination; returns its row.

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
            exporting = start('-export')
            case = {**case, 'kinds': exporting.ask(setup=case)['kinds']}
            exporting.close()
        times, answers, failed = harness.measure({'it': (start(), case)}, rounds=3, budget=args.budget,
                                                 patience=args.patience, visit=args.budget / 3)
    if failed:
        raise harness.SystemFailed(failed['it'])
    answer, times = answers['it'], times['it']
    row = {name: case[name] for name in ('form', 'backend', 'threads', 'size', 'batch')}
    row.update({f'p{p}_ms': round(float(np.percentile(times, p)), 3) for p in PERCENTILES})
    row.update(images_per_s=round(case['batch'] * 1000 / float(np.mean(times)), 3), calls=len(times),
               peak_mb=round(answer['peak_mb'] or 0), shares=answer['shares'], paddle=answer['paddle'])
    return row, answer


def arguments_of(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])

    def add(flag, **options):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)

    def numbers(text):
        values = [int(value) for value in text.split(',')]
        if min(values) < 1:
            raise ValueError
        return values

    add('model', default='replknet_31b', help='variant, YAML file, name of the zoo, run folder or checkpoint; the '
        'first two get made-up weights')
    for flag, default in (('image_size', '224'), ('batch_size', '1'), ('threads', str(os.cpu_count()))):
        add(flag, type=numbers, default=default, metavar='N,...', help='whole numbers (%(default)s)')
    for flag, known in (('form', FORMS), ('backend', BACKENDS)):
        add(flag, default=','.join(known), metavar='X,...', help='some of %(default)s')
    add('budget', type=float, default=10.0, help='seconds of timed calls for each combination, of up to 300 calls')
    add('patience', type=float, default=30.0, help='seconds to wait, for each combination, for other processes to '
        'leave the cores alone')
    add('output', help='JSON file of the results')
    add('child', help=argparse.SUPPRESS)
    add('export', action='store_true', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = arguments_of()
    if args.child:
        child(args.child, args.export)
        return
    forms, backends = harness.choose('form', args.form, FORMS), harness.choose('backend', args.backend, BACKENDS)
    header, load = {'model': args.model, **harness.describe_run(','.join(map(str, args.threads)))}, harness.Load()
    rows, answers = [], {}
    for size, batch, threads, form, backend in itertools.product(args.image_size, args.batch_size, args.threads, forms,
                                                                 backends):
        case = {'model': args.model, 'form': form, 'backend': backend, 'threads': threads, 'size': size, 'batch': batch}
        what = ', '.join(f'{name} {value}' for name, value in case.items() if name != 'model')
        print(what, file=sys.stderr)
        try:
            row, answer = bench(case, args)
        except harness.SystemFailed as error:
            print(f'{what}: left out: {error}', file=sys.stderr)
            continue
        same = answers.setdefault((size, batch), {})
        same[what] = answer
        if what in harness.disagreement(same):
            print(f'{what}: its results differ from those of {next(iter(same))}', file=sys.stderr)
        rows.append(row)
    if not rows:
        raise UserError('nothing was measured, see above')
    header = {**header, 'paddle': rows[0]['paddle'], **harness.describe_load(load)}
    for name, text in header.items():
        print(f'{name}: {text}')
    names = [name for name in rows[0] if name not in ('shares', 'paddle')]
    print('\n' + harness.table(names, [[row[name] for name in names] for row in rows]))
    names = names[:5]
    print(harness.table([*names, *KINDS], [
        [*(row[name] for name in names), *(f'{row["shares"][k]:.0%}' if row['shares'] else '-' for k in KINDS)]
        for row in rows]))
    if args.output:
        with open(args.output, 'w', encoding='utf-8') as file:
            json.dump({**header, 'results': rows}, file, indent=1)


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
