"""Running statistics of batch norm: without SyncBatchNorm, those of each rank follow its own share of the data."""
import numpy as np
import paddle

import utils


def running_statistics(model):
    """The running means and variances of a model's batch norms, {name: tensor [channels]}."""
    return {name: p for name, p in model.named_parameters() if name.endswith(('._mean', '._variance'))}


def sync_batch_norm_works(recompute=False):
    """Whether SyncBatchNorm of this Paddle computes over all ranks, found by trying. Every rank calls it.

    Paddle 3.3 may compute over each rank alone without saying so.

    Args:
        recompute: whether it will be in recomputed blocks.
    """
    from paddle.distributed.fleet.utils import recompute as call_recomputed

    norm, x = paddle.nn.SyncBatchNorm(1), paddle.full([2, 1, 1, 1], float(utils.rank()))
    x.stop_gradient = False
    try:
        y = call_recomputed(norm, x, use_reentrant=False, preserve_rng_state=False) if recompute else norm(x)
        y.sum().backward()
    except (RuntimeError, ValueError, SystemError, OSError) as error:
        utils.logger.info(f'SyncBatchNorm: {str(error).strip().splitlines()[-1:]}')
        norm._mean.set_value(paddle.full([1], float(utils.rank())))
    means = utils.all_gather_values(norm._mean.item())
    return max(means) - min(means) < 0.05  # a rank alone finds a tenth of its number


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
