"""Run by test_runs.py: two processes with accumulation must move a model as one process with all the data does."""
import sys

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from config import get_config
from engine import Amp, average_statistics, train_one_epoch
from optim import build_optimizer, parameter_groups
from replknet import RepLKNet


def build(recompute):
    """A RepLKNet whose batch norms use their running statistics, and so do not see the split of the data."""
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3, recompute=recompute)
    for layer in model.sublayers():
        if isinstance(layer, nn.BatchNorm2D):
            layer._use_global_stats = True
    return model


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((20, 3, 32, 32)).astype('float32'), rng.integers(0, 3, 20)


def train(batches, accum_iter, recompute):
    paddle.seed(0)
    model = build(recompute)
    wrapped = paddle.DataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = build_optimizer('sgd', parameter_groups(model, 0.0))
    loader = [(paddle.to_tensor(x), paddle.to_tensor(y)) for x, y in batches]
    metrics = train_one_epoch(wrapped, loader, nn.CrossEntropyLoss(), optimizer, epoch=1, first_step=0,
                              lr_at=lambda step: 0.1, amp=Amp(get_config(), 'cpu'), accum_iter=accum_iter)
    return {name: p.numpy() for name, p in model.named_parameters()}, metrics


def worker(path, recompute):
    dist.init_parallel_env()
    rank = dist.get_rank()
    images, labels = data()
    # five micro-batches of 2 per process, two per step: the last group has one
    mine = [(images[i + 2 * rank:i + 2 * rank + 2], labels[i + 2 * rank:i + 2 * rank + 2]) for i in range(0, 20, 4)]
    weights, metrics = train(mine, 2, recompute)
    norm = nn.Sequential(nn.BatchNorm2D(2))
    norm[0]._mean.set_value(paddle.to_tensor([1.0 + rank, 5.0 * rank]))
    average_statistics(norm)
    np.savez(f'{path}.{rank}.npz', loss=metrics['loss'], images=metrics['images'], mean=norm[0]._mean.numpy(),
             **{f'weight/{k}': v for k, v in weights.items()})


if __name__ == '__main__':
    out, recompute = sys.argv[1], sys.argv[2] == 'recompute'
    dist.spawn(worker, (out, recompute), nprocs=2, backend='gloo')
    images, labels = data()
    weights, metrics = train([(images[i:i + 8], labels[i:i + 8]) for i in (0, 8, 16)], 1, recompute=False)
    np.savez(f'{out}.one.npz', loss=metrics['loss'], images=metrics['images'],
             **{f'weight/{k}': v for k, v in weights.items()})
