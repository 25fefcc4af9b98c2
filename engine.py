"""One pass over the data: `train_one_epoch` and `evaluate`; both return a dict of metrics."""
import contextlib
import math
import os
import time

import paddle
import paddle.nn.functional as F
from tqdm import tqdm

import utils
from errors import TrainingStopped
from loss_scaler import LossScaler
from optim import clip_gradients, gradient_norm, set_weight_decay
from utils import logger

# one run's random draws: a stream each, so that no two ever share their numbers
STREAM_MIXUP, STREAM_PADDLE = 1, 2
SLOW_STEP_SECONDS = 3  # from which the ranks wait for each other before they exchange gradients: see utils.barrier
REPORT_SECONDS = 60  # without a progress line in a log
MAX_SKIPPED_STEPS = 100  # overflowing steps in a row after which a run with loss scaling stops


class Amp:
    """Mixed precision as the settings ask for it and the device allows.

    On the CPU Paddle's autocast changes nothing, so there it is off and the log says so once.
    """

    def __init__(self, config, device):
        self.enabled = config.AMP and device != 'cpu'
        self.level, self.dtype = config.AMP_LEVEL, config.AMP_DTYPE
        self.loss_scale, self.loss_scale_steps = config.AMP_LOSS_SCALE, config.AMP_LOSS_SCALE_STEPS
        if config.AMP and not self.enabled:
            utils.log_once('-amp: Paddle has no mixed precision on the CPU; computing in float32')

    def autocast(self):
        """Context of a forward pass."""
        return paddle.amp.auto_cast(enable=self.enabled, level=self.level, dtype=self.dtype)

    def decorate(self, model, optimizer=None):
        """Casts the weights to half precision under O2 (the optimizer keeps float32 master weights); returns both."""
        if not self.enabled or self.level != 'O2':
            return model, optimizer
        if optimizer is None:
            return paddle.amp.decorate(models=model, level='O2', dtype=self.dtype), None
        return paddle.amp.decorate(models=model, optimizers=optimizer, level='O2', dtype=self.dtype)

    def scaler(self):
        """Dynamic loss scaling for float16, None where it is not needed."""
        if self.enabled and self.dtype == 'float16':
            return LossScaler(self.loss_scale, self.loss_scale_steps)
        return None


def train_one_epoch(model, loader, criterion, optimizer, *, epoch, first_step, lr_at, amp, scaler=None, ema=None,
                    mixup=None, accum_iter=1, grad_clip=0.0, grad_clip_mode='norm', weight_decay_at=None, seed=0,
                    report_freq=20, total_steps=None, on_report=None):
    """Trains for one pass over `loader`.

    Args:
        model: a RepLKNet, or paddle.DataParallel around one.
        loader: batches of images [N, 3, H, W] (or [views x N, 3, H, W]) and labels [N]; the same number of them on
            every rank.
        criterion: mean loss of logits and labels, or of logits and soft targets after `mixup`.
        epoch: from 1; for logs and random draws.
        first_step: optimizer steps done before this epoch.
        lr_at: learning rate as a function of the optimizer step.
        amp, scaler, ema, mixup: see `Amp`, `ModelEMA`, `Mixup`.
        accum_iter: micro-batches per optimizer step; the last group may be shorter and its mean is taken over what
            it has.
        grad_clip, grad_clip_mode: see `optim.clip_gradients`; 0 for none.
        weight_decay_at: weight decay as a function of the optimizer step; None leaves the optimizer's.
        seed: of the draws of mixup and drop path.
        report_freq: optimizer steps between progress lines.
        total_steps: optimizer steps of the whole run, for the ETA.
        on_report: callable(step, epoch (a fraction), loss, lr, grad_norm (before clipping), images_per_s, and
            loss_scale with a scaler), called every `report_freq` steps and after the last one.
    Returns:
        dict with loss (mean over images and ranks), lr (of the last step), steps, skipped (overflowing steps),
        images (of all ranks), images_per_s, data_wait (share of the time) and seconds.
    Raises:
        TrainingStopped: on every rank, when the loss of any is not finite.
    """
    model.train()
    batches = len(loader)
    steps = math.ceil(batches / accum_iter)
    rank, world = utils.rank(), utils.world_size()
    parameters = [p for p in model.parameters() if not p.stop_gradient]
    progress = _Progress(f'epoch {epoch}', steps, report_freq, (total_steps or first_step + steps) - first_step)
    loss_sum = images_seen = skipped = skipped_in_a_row = 0
    group_loss, group_images = paddle.zeros([]), 0
    step, began, slow = first_step, time.perf_counter(), True
    utils.barrier()  # the first step builds the depthwise operator
    for index, (images, labels) in enumerate(progress.timed(loader)):
        if index % accum_iter == 0:
            group_size = min(accum_iter, batches - index)
            utils.seed_paddle(seed, STREAM_PADDLE, step, rank)
            lr = lr_at(step)
            optimizer.set_lr(lr)
            if weight_decay_at is not None:
                set_weight_decay(optimizer, weight_decay_at(step))
        last_of_group = index % accum_iter == group_size - 1
        if mixup is not None:
            images, labels = mixup(images, labels, utils.random_generator(seed, STREAM_MIXUP, epoch, index, rank))

        # gradients travel between the ranks once per optimizer step, with its last micro-batch
        with contextlib.nullcontext() if last_of_group or world == 1 else model.no_sync():
            with amp.autocast():
                logits = model(images)
            loss = criterion(logits, labels) / group_size
            if slow and last_of_group:
                utils.barrier()
            (loss if scaler is None else scaler.scale(loss)).backward()
        group_loss = group_loss + loss.detach() * group_size * labels.shape[0]
        group_images += labels.shape[0]
        if not last_of_group:
            continue

        # one small exchange per step; every rank learns of a loss that is not finite and stops, so none waits
        mine = float(group_loss)
        total, count, broken, seconds = utils.all_reduce_sum(
            [mine, group_images, not math.isfinite(mine), time.perf_counter() - began])
        slow, began = seconds / world > SLOW_STEP_SECONDS, time.perf_counter()
        if broken and scaler is None:
            losses = utils.all_gather_values(mine)
            ranks = [str(r) for r, value in enumerate(losses) if not math.isfinite(value)]
            raise TrainingStopped(f'step {step} (epoch {epoch}): the loss is not finite on rank {", ".join(ranks)}, '
                                  f'lr {lr:.3g}; lower TRAIN.BASE_LR, set TRAIN.GRAD_CLIP, or look at the data')
        done = step - first_step + 1
        reporting = on_report is not None and (done % report_freq == 0 or done == steps)
        applied, norm = _optimizer_step(optimizer, parameters, scaler, grad_clip, grad_clip_mode, measure=reporting)
        if applied:
            skipped_in_a_row = 0
            loss_sum += total
            images_seen += count
            if ema is not None:
                ema.update(_unwrap(model))
        else:
            skipped += 1
            skipped_in_a_row += 1
            if skipped_in_a_row == MAX_SKIPPED_STEPS:
                raise TrainingStopped(f'step {step} (epoch {epoch}): {skipped_in_a_row} steps in a row overflowed '
                                      'under loss scaling; try AMP_DTYPE bfloat16 or a lower TRAIN.BASE_LR')
        optimizer.clear_grad()
        group_loss, group_images = paddle.zeros([]), 0
        step += 1
        progress.step(count, loss=total / count, lr=lr)
        if reporting:
            on_report(step=step, epoch=epoch - 1 + done / steps, loss=total / count, lr=lr, grad_norm=float(norm),
                      images_per_s=progress.images / progress.seconds(),
                      **({} if scaler is None else {'loss_scale': scaler.value}))
    seconds = progress.close()
    return {'loss': loss_sum / images_seen if images_seen else math.nan, 'lr': lr, 'steps': steps, 'skipped': skipped,
            'images': int(progress.images), 'images_per_s': progress.images / seconds,
            'data_wait': progress.waited / seconds, 'seconds': seconds}


def _optimizer_step(optimizer, parameters, scaler, grad_clip, grad_clip_mode, measure):
    """Clips and applies the gradients.

    Returns:
        False when loss scaling dropped the step; the norm of the gradients, with `measure` or where they are clipped.
    """
    if scaler is not None:
        scaler.unscale(parameters)
    norm = None
    if grad_clip:
        norm = clip_gradients(parameters, grad_clip, grad_clip_mode)
    elif measure or scaler is not None:
        norm = gradient_norm(parameters)
    finite = True
    if scaler is not None:  # the gradients, and so this, are the same on every rank
        finite = math.isfinite(norm)
        scaler.update(finite)
    if finite:
        optimizer.step()
    return finite, norm


@paddle.no_grad()
def evaluate(model, loader, dataset_size, amp, name='eval'):
    """Accuracy and loss over a whole dataset, every image counted once over all ranks.

    Args:
        model: called without DataParallel, so the ranks may have different numbers of batches.
        loader: this rank's batches of images [N, 3, H, W] and labels [N].
        dataset_size: images of the whole dataset.
        amp: see `Amp`.
    Returns:
        dict with acc1 and acc5 (percent; with fewer than five classes the top k are all of them), loss (mean
        cross-entropy) and images.
    """
    model.eval()
    correct1, correct5, loss_sum, images_seen = 0, 0, 0.0, 0
    progress = _Progress(name, len(loader), report_freq=None)
    for images, labels in progress.timed(loader):
        with amp.autocast():
            logits = model(images)
        logits = logits.astype('float32')
        top = paddle.topk(logits, min(5, logits.shape[1]), axis=1)[1] == labels.unsqueeze(1)
        correct1 = correct1 + top[:, 0].astype('int64').sum()
        correct5 = correct5 + top.astype('int64').sum()
        loss_sum = loss_sum + F.cross_entropy(logits, labels, reduction='none').astype('float64').sum()
        images_seen += images.shape[0]
        progress.step(images.shape[0])
    progress.close()
    utils.barrier()  # a rank may have a batch more than another
    correct1, correct5, loss_sum, images_seen = utils.all_reduce_sum([correct1, correct5, loss_sum, images_seen])
    if images_seen != dataset_size:
        raise RuntimeError(f'evaluated {images_seen:.0f} images of a dataset of {dataset_size}')
    return {'acc1': 100 * correct1 / images_seen, 'acc5': 100 * correct5 / images_seen,
            'loss': loss_sum / images_seen, 'images': int(images_seen)}


def accuracy_line(metrics):
    """The line that every evaluation ends with on standard output."""
    return (f"Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} loss {metrics['loss']:.4f} "
            f"images {metrics['images']}")


def average_statistics(model):
    """Averages the running statistics of batch norm over the ranks, in place.

    Without SyncBatchNorm each rank's statistics follow its own share of the data.
    """
    if utils.world_size() == 1:
        return
    utils.log_once('batch norm: running statistics are averaged over the processes before evaluating and saving')
    buffers = [p for name, p in model.named_parameters() if name.endswith(('._mean', '._variance'))]
    flat = paddle.concat([b.flatten().astype('float32') for b in buffers])
    paddle.distributed.all_reduce(flat)
    for buffer, part in zip(buffers, paddle.split(flat / utils.world_size(), [b.size for b in buffers])):
        buffer.set_value(part.reshape(buffer.shape).astype(buffer.dtype))


class _Progress:
    """Progress of one pass: tqdm on a terminal, plain lines elsewhere; counts images and the wait for data."""

    def __init__(self, name, steps, report_freq, steps_left=None):
        self.name, self.steps, self.report_freq = name, steps, report_freq
        self.steps_left = steps if steps_left is None else steps_left
        self.images = self.waited = self.done = 0
        self.start = self.reported = time.perf_counter()
        terminal = utils.is_main() and os.isatty(2)
        self.bar = tqdm(total=steps, desc=name, leave=False) if terminal else None

    def timed(self, loader):
        """Yields the batches and adds up the time it takes to get them."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def step(self, images, **values):
        """Counts one step over `images` images (of all ranks, where the figures of all are known)."""
        self.images += images
        self.done += 1
        now = time.perf_counter()
        seconds = now - self.start
        values = {**{k: f'{v:.3g}' if k == 'lr' else f'{v:.4f}' for k, v in values.items()},
                  'images/s': f'{self.images / seconds:.1f}', 'wait': f'{100 * self.waited / seconds:.0f}%'}
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update()
        elif self._due(now):
            self.reported = now
            eta = (self.steps_left - self.done) * seconds / self.done
            line = ' '.join(f'{k} {v}' for k, v in values.items())
            logger.info(f'{self.name} step {self.done}/{self.steps} {line} eta {duration(eta)}')

    def _due(self, now):
        if self.report_freq and (self.done % self.report_freq == 0 or self.done == self.steps):
            return True
        return now - self.reported > REPORT_SECONDS

    def close(self):
        """Ends the bar; returns the seconds since the start."""
        if self.bar is not None:
            self.bar.close()
        return self.seconds()

    def seconds(self):
        """Since the start; above 0."""
        return max(time.perf_counter() - self.start, 1e-9)


def duration(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'


def _unwrap(model):
    return model._layers if isinstance(model, paddle.DataParallel) else model
