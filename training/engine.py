"""One pass over the data: `train_one_epoch` and `evaluate`; each returns a dict of metrics."""
import contextlib
import math
import time

import paddle

import utils
from errors import TrainingStopped
from training.optim import clip_gradients, gradient_norm, nonfinite_gradients, set_weight_decay
from training.progress import Progress, epoch_metrics, epoch_sums

SLOW_STEP_SECONDS = 3  # after a step this slow, the ranks meet before they exchange gradients: see utils.barrier
MAX_SKIPPED_STEPS = 100  # training stops after this many overflowing steps in a row
OVERFLOWS = (f'{MAX_SKIPPED_STEPS} steps in a row overflowed under loss scaling; try AMP_DTYPE bfloat16 or a lower '
             'TRAIN.BASE_LR')


def train_one_epoch(parts, loader, *, epoch, first_step, sums=None, on_report=None, votes=list, after_step=None):
    """Trains for one pass over `loader`, or for the rest of a pass that was interrupted.

    Args:
        parts: the model, its loss, its optimizer and so on, see `setup.TrainingParts`.
        loader: batches of images [N, 3, H, W] (or [views x N, 3, H, W]) and labels [N] (several per image: [N, K]):
            those not yet trained on in this pass, equally many on every rank. Its length is that of the whole pass.
        epoch: number of the pass, from 1.
        first_step: optimizer steps done before this pass.
        sums: totals over the steps of this pass so far, see `progress.epoch_sums`; updated after every step.
        on_report: callable(step, epoch (fractional), loss, lr, grad_norm (before clipping), images_per_s, and
            loss_scale with a scaler), called every `report_freq` steps and after the last one.
        votes: callable() -> numbers; every step sums them over the ranks and passes the sums to `after_step`.
        after_step: callable(*sums of votes), called after every step.
    Returns:
        dict of metrics, see `progress.epoch_metrics`.
    Raises:
        TrainingStopped: on every rank, when the loss of any rank is not finite or loss scaling keeps overflowing.
    """
    settings, scaler, world = parts.settings, parts.scaler, utils.world_size()
    steps = math.ceil(len(loader) / settings.accum_iter)
    sums = epoch_sums() if sums is None else sums
    progress = Progress(f'epoch {epoch}', steps, settings.report_freq,
                        (settings.total_steps or first_step + steps) - first_step, sums)
    batches = progress.timed(loader)
    parts.training_mode()
    began, slow = time.perf_counter(), True
    utils.barrier()  # the first step builds the depthwise operator
    for step in range(first_step + sums['steps'], first_step + steps):
        lr = _begin_step(parts, step)
        start = (step - first_step) * settings.accum_iter
        group = range(start, min(start + settings.accum_iter, len(loader)))
        my_loss, my_images = _accumulate_gradients(parts, batches, epoch, group, wait_for_ranks=slow)
        done = step + 1 - first_step
        reporting = on_report is not None and (done % settings.report_freq == 0 or done == steps)
        norm = _finish_gradients(parts, measure=reporting)

        # one small exchange, the step's only wait for the device; all ranks learn of a loss that is not finite, so none
        # is left waiting; all have the same norm
        loss_sum, images, seconds, *voted, norm_value = utils.all_reduce_measured(
            my_loss, [my_images, time.perf_counter() - began, *votes()], norm)
        slow, began = seconds / world > SLOW_STEP_SECONDS, time.perf_counter()
        if scaler is None and not math.isfinite(loss_sum):
            raise TrainingStopped(f'step {step} (epoch {epoch}): {_broken_loss(parts, float(my_loss), lr)}')

        applied = scaler is None or math.isfinite(norm_value)
        _apply_gradients(parts, norm, applied)
        _count_step(sums, applied, loss_sum, images, lr)
        if sums['skipped_in_a_row'] == MAX_SKIPPED_STEPS:
            raise TrainingStopped(f'step {step} (epoch {epoch}): {OVERFLOWS}')
        progress.step(images, loss=loss_sum / images, lr=lr)
        if reporting:
            on_report(step=step + 1, epoch=epoch - 1 + done / steps, loss=loss_sum / images, lr=lr,
                      grad_norm=norm_value, images_per_s=sums['images'] / sums['seconds'],
                      **({} if scaler is None else {'loss_scale': scaler.value}))
        if after_step is not None:
            after_step(*voted)
    next(batches, None)  # lets the loader end its workers
    progress.close()
    return epoch_metrics(sums, steps)


def _begin_step(parts, step):
    """Sets the seed of drop path, the learning rate and the weight decay of a step; returns the learning rate."""
    utils.seed_paddle(parts.settings.seed, utils.STREAM_PADDLE, step, utils.rank())
    lr = parts.lr_at(step)
    parts.optimizer.set_lr(lr)
    if parts.weight_decay_at is not None:
        set_weight_decay(parts.optimizer, parts.weight_decay_at(step))
    return lr


def _accumulate_gradients(parts, batches, epoch, group, wait_for_ranks):
    """Forward and backward passes over the micro-batches of one optimizer step.

    Args:
        batches: iterator over images and labels.
        epoch, group: the epoch, and the range of the micro-batches' indices in it.
        wait_for_ranks: whether the ranks meet before they exchange gradients.
    Returns:
        sum of the loss over the images of this rank, a float32 scalar tensor, and their number.
    """
    loss_sum, images_seen = paddle.zeros([]), 0
    for index, (images, labels) in zip(group, batches):
        if parts.mixup is not None:
            rng = utils.random_generator(parts.settings.seed, utils.STREAM_MIXUP, epoch, index, utils.rank())
            images, labels = parts.mixup(images, labels, rng)
        last = index == group[-1]
        # the ranks exchange gradients once per optimizer step, in its last backward pass
        with contextlib.nullcontext() if last or utils.world_size() == 1 else parts.model.no_sync():
            with parts.amp.autocast():
                logits = parts.model(images)
            loss = parts.criterion(logits, labels) / len(group)
            if wait_for_ranks and last:
                utils.barrier()
            (loss if parts.scaler is None else parts.scaler.scale(loss)).backward()
        loss_sum = loss_sum + loss.detach() * len(group) * labels.shape[0]
        images_seen += labels.shape[0]
    return loss_sum, images_seen


def _broken_loss(parts, loss, lr):
    """The message for a loss that is not finite on some rank; every rank calls it with its own loss."""
    ranks = [str(rank) for rank, value in enumerate(utils.all_gather_values(loss)) if not math.isfinite(value)]
    where = nonfinite_gradients(parts.bare_model, parts.masters.by_name)
    return (f'the loss is not finite on rank {", ".join(ranks)}, lr {lr:.3g}, {where}; lower TRAIN.BASE_LR, set '
            'TRAIN.GRAD_CLIP, or check the data')


def _finish_gradients(parts, measure):
    """Collects the gradients of an optimizer step and divides them by the loss scale.

    Args:
        measure: whether the norm of the gradients is needed for a report.
    Returns:
        their norm before clipping, a float32 scalar tensor; None where nothing needs it.
    """
    settings, scaler, parameters = parts.settings, parts.scaler, parts.trained_parameters
    parts.masters.take_gradients()
    for group in parts.flat:
        group.collect()
    if scaler is not None:
        scaler.unscale(parameters)
    clips = settings.grad_clip and settings.grad_clip_mode == 'norm'
    return gradient_norm(parameters) if measure or clips or scaler is not None else None


def _apply_gradients(parts, norm, applied):
    """Clips and applies the gradients, updates the moving average, and clears the gradients.

    Args:
        norm: see `_finish_gradients`.
        applied: whether to apply them, which a step that overflows under loss scaling does not; then the loss scale
            changes and nothing else.
    """
    settings = parts.settings
    if parts.scaler is not None:
        parts.scaler.update(applied)
    if applied:
        if settings.grad_clip:
            clip_gradients(parts.trained_parameters, settings.grad_clip, settings.grad_clip_mode, norm)
        parts.optimizer.step()
        for group in parts.flat:
            group.keep_unused()
        parts.masters.update_model()
        if parts.ema is not None:
            parts.ema.update(parts.bare_model, parts.masters.by_name, parts.flat)
    parts.optimizer.clear_grad()
    parts.masters.clear_gradients()


def _count_step(sums, applied, loss_sum, images, lr):
    """Adds a step to the totals of its epoch, without its loss if it was skipped."""
    sums['lr'] = lr
    if applied:
        sums['loss'] += loss_sum
        sums['loss_images'] += images
        sums['skipped_in_a_row'] = 0
    else:
        sums['skipped'] += 1
        sums['skipped_in_a_row'] += 1


@paddle.no_grad()
def evaluate(model, loader, dataset_size, amp, name='eval', on_batch=None, scores=None):
    """Accuracy and loss over a whole dataset; every image counts once, over all ranks.

    Args:
        model: a RepLKNet, not wrapped in DataParallel, since the ranks may have different numbers of batches.
        loader: this rank's batches of images [N, 3, H, W] and labels [N].
        dataset_size: number of images in the whole dataset.
        amp: see `Amp`.
        name: label of the progress lines.
        on_batch: callable(logits [N, K], labels [N]), called after each batch.
        scores: `evaluation.multi_label.Scores` where images have several labels, which are then [N, K].
    Returns:
        dict of acc1 and acc5 (percent; with fewer than five classes acc5 is 100), loss (mean cross-entropy) and images;
        with `scores`, see `Scores.metrics`.
    Raises:
        TrainingStopped: on every rank, when logits are not finite.
        RuntimeError: the ranks together have not seen `dataset_size` images.
    """
    model.eval()
    batch_sums = utils.accuracy_sums if scores is None else scores.add
    sums, images_seen = [0, 0, 0.0, 0] if scores is None else [0.0, 0], 0
    progress = Progress(name, len(loader))
    for images, labels in progress.timed(loader):
        with amp.autocast():
            logits = model(images)
        sums = [total + batch for total, batch in zip(sums, batch_sums(logits, labels))]
        images_seen += images.shape[0]
        if on_batch is not None:
            on_batch(logits, labels)
        progress.step(images.shape[0])
    progress.close()
    utils.barrier()  # a rank may have one batch more than another
    *sums, broken, images_seen = utils.all_reduce_sum([*sums, images_seen])
    if broken:
        hint = ', or evaluate without -amp or with AMP_DTYPE bfloat16' if amp.enabled else ''
        raise TrainingStopped(f'{name}: the logits of {broken:.0f} of {images_seen:.0f} images are not finite; '
                              f'check the weights{hint}')
    if images_seen != dataset_size:
        raise RuntimeError(f'evaluated {images_seen:.0f} images of a dataset of {dataset_size}')
    if scores is not None:
        return scores.metrics(*sums, dataset_size, [index for batch in loader.batch_sampler for index in batch])
    return utils.accuracy_metrics(*sums, images_seen)
