"""Running statistics of batch norm: without SyncBatchNorm, those of each rank follow its own share of the data."""
import numpy as np
import paddle

import utils


def running_statistics(model):
    """The running means and variances of a model's batch norms, {name: tensor [channels]}."""
    return {name: p for name, p in model.named_parameters() if name.endswith(('._mean', '._variance'))}


def average_statistics(model):
    """Averages the running statistics over the ranks, in place. Every rank calls it."""
    if utils.world_size() == 1:
        return
    utils.log_once('batch norm: running statistics are averaged over the processes before evaluating and saving')
    buffers = list(running_statistics(model).values())
    flat = paddle.concat([b.flatten().astype('float32') for b in buffers])
    paddle.distributed.all_reduce(flat)
    for buffer, part in zip(buffers, paddle.split(flat / utils.world_size(), [b.size for b in buffers])):
        buffer.set_value(part.reshape(buffer.shape).astype(buffer.dtype))


def gather_statistics(model):
    """The running statistics of all ranks, {name: float32 array [ranks, channels]}. Every rank calls it."""
    buffers = running_statistics(model)
    ranks = []
    paddle.distributed.all_gather(ranks, paddle.concat([b.astype('float32') for b in buffers.values()]))
    rows = paddle.stack(ranks).numpy()
    return dict(zip(buffers, np.split(rows, np.cumsum([b.size for b in buffers.values()])[:-1], axis=1)))


def set_statistics(model, statistics):
    """Sets this rank's running statistics to its row of what `gather_statistics` returned."""
    for name, buffer in running_statistics(model).items():
        buffer.set_value(paddle.to_tensor(np.ascontiguousarray(statistics[name][utils.rank()])).astype(buffer.dtype))
