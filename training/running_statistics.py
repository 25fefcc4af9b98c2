"""Running statistics of batch norm across ranks: averaging, gathering and restoring them."""
import numpy as np
import paddle

import utils


def _statistics(model):
    """The running statistics of batch norm, {name: tensor}."""
    return {name: p for name, p in model.named_parameters() if name.endswith(('._mean', '._variance'))}


def average_statistics(model):
    """Averages the running statistics of batch norm over the ranks, in place.

    Without SyncBatchNorm each rank's statistics follow its own share of the data.
    """
    if utils.world_size() == 1:
        return
    utils.log_once('batch norm: running statistics are averaged over the processes before evaluating and saving')
    buffers = list(_statistics(model).values())
    flat = paddle.concat([b.flatten().astype('float32') for b in buffers])
    paddle.distributed.all_reduce(flat)
    for buffer, part in zip(buffers, paddle.split(flat / utils.world_size(), [b.size for b in buffers])):
        buffer.set_value(part.reshape(buffer.shape).astype(buffer.dtype))


def gather_statistics(model):
    """The running statistics of every rank, {name: float32 array [ranks, channels]}; every rank calls it."""
    buffers = _statistics(model)
    ranks = []
    paddle.distributed.all_gather(ranks, paddle.concat([b.astype('float32') for b in buffers.values()]))
    rows = paddle.stack(ranks).numpy()
    return dict(zip(buffers, np.split(rows, np.cumsum([b.size for b in buffers.values()])[:-1], axis=1)))


def set_statistics(model, statistics):
    """Gives this rank its own row of `gather_statistics`."""
    for name, buffer in _statistics(model).items():
        buffer.set_value(paddle.to_tensor(np.ascontiguousarray(statistics[name][utils.rank()])).astype(buffer.dtype))
