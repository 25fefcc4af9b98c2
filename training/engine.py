"""One pass over the data: `train_one_epoch` and `evaluate`; both return a dict of metrics."""
import contextlib
import math
import time

import paddle
import paddle.nn.functional as F

import utils
from errors import TrainingStopped
from training.optim import clip_gradients, gradient_norm, set_weight_decay
from training.progress import Progress, epoch_sums

# one run's random draws: a stream each, so that no two ever share their numbers
STREAM_MIXUP, STREAM_PADDLE = 1, 2
SLOW_STEP_SECONDS = 3  # from which the ranks wait for each other before they exchange gradients: see utils.barrier
MAX_SKIPPED_STEPS = 100  # overflowing steps in a row after which a run with loss scaling stops


def train_one_epoch(model, loader, criterion, optimizer, *, epoch, first_step, lr_at, amp, scaler=None, ema=None,
                    mixup=None, accum_iter=1, grad_clip=0.0, grad_clip_mode='norm', weight_decay_at=None, seed=0,
                    report_freq=20, total_steps=None, on_report=None, sums=None, votes=list, after_step=None):
    """Trains for one pass over `loader`, or for what is left of it.

    Args:
        model: a RepLKNet, or paddle.DataParallel around one.
        loader: batches of images [N, 3, H, W] (or [views x N, 3, H, W]) and labels [N], those of `sums` left out; the
            same number of them on every rank. Its length is that of the whole pass.
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
        sums: what the steps of this pass add up to so far, see `epoch_sums`; brought up to date after every step.
        votes: callable() -> numbers that are summed over the ranks with every step, and go to `after_step`.
        after_step: callable(*votes), called after every step.
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
    progress = Progress(f'epoch {epoch}', steps, report_freq, (total_steps or first_step + steps) - first_step, sums)
    sums = epoch_sums() if sums is None else sums
    group_loss, group_images = paddle.zeros([]), 0
    step, began, slow = first_step + sums['steps'], time.perf_counter(), True
    utils.barrier()  # the first step builds the depthwise operator
    for index, (images, labels) in enumerate(progress.timed(loader), sums['steps'] * accum_iter):
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
        total, count, broken, seconds, *agreed = utils.all_reduce_sum(
            [mine, group_images, not math.isfinite(mine), time.perf_counter() - began, *votes()])
        slow, began = seconds / world > SLOW_STEP_SECONDS, time.perf_counter()
        if broken and scaler is None:
            losses = utils.all_gather_values(mine)
            ranks = [str(r) for r, value in enumerate(losses) if not math.isfinite(value)]
            raise TrainingStopped(f'step {step} (epoch {epoch}): the loss is not finite on rank {", ".join(ranks)}, '
                                  f'lr {lr:.3g}, {_broken_gradients(_unwrap(model))}; lower TRAIN.BASE_LR, set '
                                  'TRAIN.GRAD_CLIP, or look at the data')
        done = step - first_step + 1
        reporting = on_report is not None and (done % report_freq == 0 or done == steps)
        applied, norm = _optimizer_step(optimizer, parameters, scaler, grad_clip, grad_clip_mode, measure=reporting)
        if applied:
            sums['skipped_in_a_row'] = 0
            sums['loss'] += total
            sums['loss_images'] += count
            if ema is not None:
                ema.update(_unwrap(model))
        else:
            sums['skipped'] += 1
            sums['skipped_in_a_row'] += 1
            if sums['skipped_in_a_row'] == MAX_SKIPPED_STEPS:
                raise TrainingStopped(f'step {step} (epoch {epoch}): {MAX_SKIPPED_STEPS} steps in a row overflowed '
                                      'under loss scaling; try AMP_DTYPE bfloat16 or a lower TRAIN.BASE_LR')
        optimizer.clear_grad()
        group_loss, group_images = paddle.zeros([]), 0
        step += 1
        progress.step(count, loss=total / count, lr=lr)
        sums.update(steps=done, lr=lr, images=progress.images, waited=progress.waited, seconds=progress.seconds())
        if reporting:
            on_report(step=step, epoch=epoch - 1 + done / steps, loss=total / count, lr=lr, grad_norm=float(norm),
                      images_per_s=progress.images / sums['seconds'],
                      **({} if scaler is None else {'loss_scale': scaler.value}))
        if after_step is not None:
            after_step(*agreed)
    progress.close()
    seconds = max(sums['seconds'], 1e-9)  # 0 where nothing was left to do
    return {'loss': sums['loss'] / sums['loss_images'] if sums['loss_images'] else math.nan, 'lr': sums['lr'],
            'steps': steps, 'skipped': sums['skipped'], 'images': int(sums['images']),
            'images_per_s': sums['images'] / seconds, 'data_wait': sums['waited'] / seconds, 'seconds': seconds}


def _broken_gradients(model):
    """In words, the parts of the model whose gradients are not finite."""
    parts, trained = {}, [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    for name, parameter in trained:
        if not bool(paddle.isfinite(parameter.grad.astype('float32')).all()):
            part = '.'.join(name.split('.')[:2 if name.startswith(('stages', 'transitions')) else 1])
            parts.setdefault(part, []).append(name)
    broken = sum(map(len, parts.values()))
    if broken in (0, len(trained)):
        return 'no gradient is finite' if broken else 'all gradients are finite'
    return 'gradients not finite in ' + ', '.join(
        f'{part} ({names[0][len(part) + 1:]}{f" and {len(names) - 1} more" if len(names) > 1 else ""})'
        for part, names in parts.items())


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
    progress = Progress(name, len(loader), report_freq=None)
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


def _unwrap(model):
    return model._layers if isinstance(model, paddle.DataParallel) else model
