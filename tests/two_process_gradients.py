"""Run by test_runs.py: two processes must update a model as one process with all the data does, and stop together."""
import itertools
import sys
import time

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

import utils
from config import get_config
from errors import TrainingStopped
from launcher import end_process
from replknet import RepLKNet
from training.amp import Amp
from training.engine import evaluate, train_one_epoch
from training.optim import build_optimizer, parameter_groups
from training.running_statistics import average_statistics
from training.setup import StepSettings, TrainingParts


def build():
    """A RepLKNet whose batch norms use their running statistics, so that the split of the data does not matter."""
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    for layer in model.sublayers():
        if isinstance(layer, nn.BatchNorm2D):
            layer._use_global_stats = True
    return model


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((20, 3, 32, 32)).astype('float32'), rng.integers(0, 3, 20)


def train(batches, accum_iter, criterion=nn.functional.cross_entropy):
    paddle.seed(0)
    model = build()
    parts = TrainingParts(
        model=paddle.DataParallel(model) if dist.get_world_size() > 1 else model, criterion=criterion,
        optimizer=build_optimizer('sgd', parameter_groups(model, 0.0)), lr_at=lambda step: 0.1,
        amp=Amp(get_config(), 'cpu'), settings=StepSettings(accum_iter))
    loader = [(paddle.to_tensor(x), paddle.to_tensor(y)) for x, y in batches]
    metrics = train_one_epoch(parts, loader, epoch=1, first_step=0)
    return {name: p.numpy() for name, p in model.named_parameters()}, metrics


def count_exchanges(batches):
    """Numbers of small all-reduces in an epoch of training and in an evaluation, apart from the gradients."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor: calls.append(tensor.shape) or all_reduce(tensor)
    try:
        train(batches, 2)
        training = len(calls)
        evaluate(build(), [(paddle.to_tensor(x), paddle.to_tensor(y)) for x, y in batches], 20,
                 Amp(get_config(), 'cpu'))
        return training, len(calls) - training
    finally:
        dist.all_reduce = all_reduce


def wait(path):
    """Rank 0 starts its evaluation later than gloo's timeout, which is 30 s."""
    dist.init_parallel_env()
    utils.barrier()
    time.sleep(35 * (dist.get_rank() == 0))
    images, labels = (paddle.to_tensor(array) for array in data())
    evaluate(build(), [(images[dist.get_rank()::2], labels[dist.get_rank()::2])], 20, Amp(get_config(), 'cpu'))
    np.savez(f'{path}.{dist.get_rank()}.npz')
    end_process(0)


def worker(path):
    dist.init_parallel_env()
    rank = dist.get_rank()
    images, labels = data()
    # five micro-batches of 2 per process, two per step: the last group has one
    mine = [(images[i + 2 * rank:i + 2 * rank + 2], labels[i + 2 * rank:i + 2 * rank + 2]) for i in range(0, 20, 4)]
    weights, metrics = train(mine, 2)
    norm = nn.Sequential(nn.BatchNorm2D(2))
    norm[0]._mean.set_value(paddle.to_tensor([1.0 + rank, 5.0 * rank]))
    average_statistics(norm)
    losses = itertools.count()

    def nan_on_rank_1(logits, labels):
        return nn.functional.cross_entropy(logits, labels) * (np.nan if (rank, next(losses)) == (1, 2) else 1)

    try:
        train(mine, 1, nan_on_rank_1)
        stopped = ''
    except TrainingStopped as error:
        stopped = str(error)
    np.savez(f'{path}.{rank}.npz', loss=metrics['loss'], images=metrics['images'], mean=norm[0]._mean.numpy(),
             exchanges=count_exchanges(mine), stopped=stopped,
             **{f'weight/{k}': v for k, v in weights.items()})
    end_process(0)


if __name__ == '__main__':
    out, mode = sys.argv[1:]
    if mode == 'wait':
        dist.spawn(wait, (out,), nprocs=2, backend='gloo')
        sys.exit()
    dist.spawn(worker, (out,), nprocs=2, backend='gloo')
    images, labels = data()
    weights, metrics = train([(images[i:i + 8], labels[i:i + 8]) for i in (0, 8, 16)], 1)
    np.savez(f'{out}.one.npz', loss=metrics['loss'], images=metrics['images'],
             **{f'weight/{k}': v for k, v in weights.items()})
