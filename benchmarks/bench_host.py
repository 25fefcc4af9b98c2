"""Host time and operators of a training step: what Python and Paddle's dispatch cost, with hardly any computing.

    python benchmarks/bench_host.py
    python benchmarks/bench_host.py -optimizers=adamw,lion -against=../before     # beside the code of another checkout

RepLKNet-31B with 16 channels per stage and images of 32 pixels, batch 1, on one thread of the CPU. Times are medians of
milliseconds that the process has computed, so other processes hardly matter, over rounds in which both checkouts take
turns. Operators are the kernels that Paddle launches from Python or the backward pass; the C++ operators of
large_kernel count as one each.
"""
import json
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

from harness import ROOT, ArgumentParser, choose, describe_run, exit_status, import_paddle, table

PARTS = ('forward', 'loss and backward', 'after the backward pass')
CASES = {'plain': [], 'clipping': ['TRAIN.GRAD_CLIP', 5.0], 'loss scaling': []}
OPTIMIZERS = ('adamw', 'nadam', 'lion', 'adan', 'lamb', 'sgd', 'momentum')


def training_parts(optimizer, case):
    """TrainingParts of the model, and the batch that every step uses."""
    paddle = import_paddle(threads=1)

    from config import get_config
    from replknet import build_replknet
    from training.amp import Amp, LossScaler
    from training.run import Start
    from training.setup import build_training
    config = get_config(None, [
        'MODEL.CHANNELS', [16] * 4, 'DATA.IMAGE_SIZE', 32, 'DATA.BATCH_SIZE', 1, 'TRAIN.NUM_EPOCHS', 2,
        'TRAIN.WARMUP_EPOCHS', 0, 'TRAIN.MIXUP_PROB', 0.0, 'TRAIN.SMOOTHING', 0.0, 'TRAIN.OPTIMIZER.NAME', optimizer,
        *(['TRAIN.OPTIMIZER.BETAS', [0.98, 0.92, 0.99]] if optimizer == 'adan' else []), *CASES[case]])
    paddle.seed(0)
    loader = type('Loader', (list,), {'dataset': range(100)})([None] * 100)
    parts, _ = build_training(config, 'cpu', Amp(config, 'cpu'), Start(build_replknet(config), None, None), loader,
                              types.SimpleNamespace(identity={}))
    if case == 'loss scaling':  # Paddle has no mixed precision on the CPU, but the scaler's operations are the same
        object.__setattr__(parts, 'scaler', LossScaler(1024.0))
    return parts, [(paddle.randn([1, 3, 32, 32]), paddle.zeros([1], 'int64'))]


def step_parts(parts, batches, step):
    """The parts of a training step, as functions to call one after the other."""
    from training import engine
    model, state = parts.bare_model, {}

    def forward():
        engine._begin_step(parts, step)
        state['logits'] = model(batches[0][0])

    def backward():
        loss = parts.criterion(state.pop('logits'), batches[0][1])
        (loss if parts.scaler is None else parts.scaler.scale(loss)).backward()
        float(loss)

    def update():
        if hasattr(engine, '_optimizer_step'):  # of an earlier checkout
            engine._optimizer_step(parts, measure=False)
        else:
            engine._apply_gradients(parts, engine._finish_gradients(parts, measure=False), True)
    return dict(zip(PARTS, (forward, backward, update)))


def launches(run):
    """How many kernels a function launches."""
    from paddle import profiler

    def count(node):
        return str(node.type).endswith('DygraphKernelLaunch') + sum(map(count, node.children_node))
    with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None) as profile:
        run()
    return sum(map(count, profile.profiler_result.get_data().values()))


def measure(optimizer, case, steps):
    """{part: [milliseconds of each step]} and {part: operators}, after two steps that are not measured."""
    parts, batches = training_parts(optimizer, case)
    parts.training_mode()
    times, operators = {part: [] for part in PARTS}, {}
    for step in range(steps + 3):
        for part, run in step_parts(parts, batches, step).items():
            start = time.process_time()
            if step == 2:
                operators[part] = launches(run)
            else:
                run()
            if step > 2:
                times[part].append((time.process_time() - start) * 1e3)
    return {'ms': times, 'operators': operators}


def in_child(root, *arguments):
    """The result of `measure` in a process with the code of a checkout."""
    command = [sys.executable, __file__, '-child', json.dumps([str(root), *arguments])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{root}: {done.stderr.strip().splitlines()[-1:]}')
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if sys.argv[1:2] == ['-child']:
        root, *rest = json.loads(sys.argv[2])
        sys.path.insert(0, root)
        print(json.dumps(measure(*rest)))
        return 0
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('-optimizers', default='adamw', help=f'comma-separated: {", ".join(OPTIMIZERS)}')
    parser.add_argument('-cases', default=','.join(CASES), help=f'comma-separated: {", ".join(CASES)}')
    parser.add_argument('-against', help='folder of another checkout')
    parser.add_argument('-rounds', type=int, default=3)
    parser.add_argument('-steps', type=int, default=20, help='steps of each round')
    options = parser.parse_args()
    roots = [*([Path(options.against).resolve()] if options.against else []), Path(ROOT)]
    rows = []
    for optimizer in choose('optimizers', options.optimizers, OPTIMIZERS):
        for case in choose('cases', options.cases, CASES):
            rounds = [[in_child(root, optimizer, case, options.steps) for root in roots] for _ in range(options.rounds)]
            for part in PARTS:
                cells = []
                for found in zip(*rounds):
                    milliseconds = statistics.median(ms for one in found for ms in one['ms'][part])
                    cells += [found[0]['operators'][part], f'{milliseconds:.1f}']
                rows.append([optimizer, case, part, *cells])
    for name, text in describe_run(1).items():
        print(f'{name}: {text}')
    names = ('operators there', 'ms there', 'operators', 'ms')
    print(table(['optimizer', 'case', 'part', *names[-2 * len(roots):]], rows))
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
