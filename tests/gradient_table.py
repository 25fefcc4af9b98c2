"""Run by test_gradients.py: the steps of every combination of features against plain forward and backward passes.

Prints a JSON line per combination and rank: the largest deviation of a gradient and of a running statistic, relative to
the largest element of its tensor, or for tensors that are zero up to rounding to 1/1000 of the largest element of all.
"""
import itertools
import json

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F

import utils
from config import get_config
from launcher import end_process
from replknet import RepLKNet
from training.amp import Amp, LossScaler
from training.engine import train_one_epoch
from training.optim import parameter_groups
from training.setup import StepSettings, TrainingParts

MICRO_BATCHES = 3  # per rank: with two per step the last step has one


class Recorder(paddle.optimizer.SGD):
    """Keeps the gradients of every step."""

    def __init__(self, model):
        super().__init__(learning_rate=0.0, parameters=parameter_groups(model, 0.0))
        self.gradients = []
        self.named = {n: p for n, p in model.named_parameters() if not p.stop_gradient}

    def step(self):
        self.gradients.append({name: p.grad.numpy() for name, p in self.named.items()})
        super().step()


def build(recompute):
    paddle.seed(0)
    return RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3, drop_path=0.5, recompute=recompute)


def micro_batch(rank, index):
    rng = utils.random_generator(rank, index)
    return paddle.to_tensor(rng.standard_normal((4, 3, 64, 64), 'float32')), paddle.to_tensor(rng.integers(0, 3, 4))


def statistics(model):
    return {name: p.numpy() for name, p in model.named_parameters() if p.stop_gradient}


def trained(rank, world, accum, recompute, scaled):
    model = build(recompute)
    optimizer = Recorder(model)
    parts = TrainingParts(
        model=paddle.DataParallel(model) if world > 1 else model, criterion=F.cross_entropy, optimizer=optimizer,
        lr_at=lambda step: 0.01, amp=Amp(get_config(), 'cpu'), scaler=LossScaler() if scaled else None,
        settings=StepSettings(accum))
    train_one_epoch(parts, [micro_batch(rank, i) for i in range(MICRO_BATCHES)], epoch=1, first_step=0)
    return optimizer.gradients, statistics(model)


def plain(world, accum):
    """The gradients, and each rank's statistics, from plain passes over the micro-batches of all ranks in turn."""
    model = build(False)
    optimizer = Recorder(model)
    optimizer.set_lr(0.01)
    ranks = [statistics(model) for _ in range(world)]
    for step, start in enumerate(range(0, MICRO_BATCHES, accum)):
        group = range(start, min(start + accum, MICRO_BATCHES))
        means = []
        for rank in range(world):
            model.set_state_dict(ranks[rank])
            utils.seed_paddle(0, utils.STREAM_PADDLE, step, rank)
            for index in group:
                images, labels = micro_batch(rank, index)
                (F.cross_entropy(model(images), labels) / len(group)).backward()
            ranks[rank] = statistics(model)
            means.append({name: p.grad.clone() for name, p in optimizer.named.items()})
            optimizer.clear_grad()
        for name, parameter in optimizer.named.items():
            parameter.grad = sum(mean[name] for mean in means) / world
        optimizer.step()
        optimizer.clear_grad()
    return optimizer.gradients, ranks


def deviation(got, expected):
    assert got.keys() == expected.keys()
    floor = max(np.abs(array).max() for array in expected.values()) / 1000
    return max(float(np.abs(got[name] - array).max() / max(floor, np.abs(array).max()))
               for name, array in expected.items())


def table(world):
    if world > 1:
        dist.init_parallel_env()
    rank = dist.get_rank()
    for accum in (1, 2):
        gradients, ranks = plain(world, accum)
        for recompute, scaled in itertools.product((False, True), repeat=2):
            got, moved = trained(rank, world, accum, recompute, scaled)
            assert len(got) == len(gradients)
            print(json.dumps({
                'processes': world, 'rank': rank, 'accumulation': accum, 'recompute': recompute, 'loss_scaling': scaled,
                'gradient': max(deviation(*pair) for pair in zip(got, gradients)),
                'statistic': deviation(moved, ranks[rank])}), flush=True)
    if world > 1:
        end_process(0)


if __name__ == '__main__':
    table(1)
    dist.spawn(table, (2,), nprocs=2, backend='gloo')
