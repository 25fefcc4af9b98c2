"""Training and evaluation: `train_one_epoch` and `evaluate` return dicts; `run` ties the parts of a run together."""
import contextlib
import io
import math
import os
import time
from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F
from tqdm import tqdm

import checkpoint
import utils
from config import config_text
from datasets import get_dataloader, get_dataset
from ema import ModelEMA
from errors import TrainingStopped, UserError
from losses import build_loss
from mixup import Mixup
from optim import build_optimizer, clip_gradients, learning_rate, parameter_groups
from replknet import build_replknet
from run_folder import RunFolder, resolve_resume
from utils import logger
from zoo import pretrained_weights

# one run's random draws: a stream each, so that no two ever share their numbers
STREAM_MIXUP, STREAM_PADDLE, STREAM_INIT = 1, 2, 3
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
            return paddle.amp.GradScaler(init_loss_scaling=65536.0, incr_every_n_steps=2000,
                                         decr_every_n_nan_or_inf=1)
        return None


def train_one_epoch(model, loader, criterion, optimizer, *, epoch, first_step, lr_at, amp, scaler=None, ema=None,
                    mixup=None, accum_iter=1, grad_clip=0.0, seed=0, report_freq=20, total_steps=None):
    """Trains for one pass over `loader`.

    Args:
        model: a RepLKNet, or paddle.DataParallel around one.
        loader: batches of images [N, 3, H, W] and labels [N]; the same number of them on every rank.
        criterion: mean loss of logits and labels, or of logits and soft targets after `mixup`.
        epoch: from 1; for logs and random draws.
        first_step: optimizer steps done before this epoch.
        lr_at: learning rate as a function of the optimizer step.
        amp, scaler, ema, mixup: see `Amp`, `ModelEMA`, `Mixup`.
        accum_iter: micro-batches per optimizer step; the last group may be shorter and its mean is taken over what
            it has.
        grad_clip: global norm of the gradients of a step; 0 for none.
        seed: of the draws of mixup and drop path.
        report_freq: optimizer steps between progress lines.
        total_steps: optimizer steps of the whole run, for the ETA.
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
        group_loss = group_loss + loss.detach() * group_size * images.shape[0]
        group_images += images.shape[0]
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
        if _optimizer_step(optimizer, parameters, scaler, grad_clip):
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
    seconds = progress.close()
    return {'loss': loss_sum / images_seen if images_seen else math.nan, 'lr': lr, 'steps': steps, 'skipped': skipped,
            'images': int(progress.images), 'images_per_s': progress.images / seconds,
            'data_wait': progress.waited / seconds, 'seconds': seconds}


def _optimizer_step(optimizer, parameters, scaler, grad_clip):
    """Clips and applies the gradients; False when loss scaling dropped the step."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    if grad_clip:
        clip_gradients(parameters, grad_clip)
    if scaler is None:
        optimizer.step()
        return True
    overflow = bool(scaler._found_inf)  # set by unscale_; the gradients, and so this, are the same on every rank
    with contextlib.redirect_stdout(io.StringIO()):  # Paddle prints each overflow
        scaler.step(optimizer)
        scaler.update()
    return not overflow


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
            logger.info(f'{self.name} step {self.done}/{self.steps} {line} eta {_duration(eta)}')

    def _due(self, now):
        if self.report_freq and (self.done % self.report_freq == 0 or self.done == self.steps):
            return True
        return now - self.reported > REPORT_SECONDS

    def close(self):
        """Ends the bar; returns the seconds since the start."""
        if self.bar is not None:
            self.bar.close()
        return max(time.perf_counter() - self.start, 1e-9)


def _duration(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'


def _unwrap(model):
    return model._layers if isinstance(model, paddle.DataParallel) else model


# ---- a run

def run(config, device):
    """Evaluates, or trains with evaluation, as the settings say; every rank calls it.

    A run resumes in this order: weights, EMA, optimizer, loss scaler, then epoch and step; the draws of the data,
    mixup and drop path follow from seed, epoch and step.
    Args:
        config: frozen settings; `config.SAVE` names the run folder.
        device: kind of the device in use ('gpu', 'cpu', ...).
    Returns:
        dict of the last evaluation's metrics, and for a training run of the best ones.
    Raises:
        UserError, FileNotFoundError: what the user gave cannot be used.
        TrainingStopped: the loss is not finite.
    """
    amp = Amp(config, device)
    folder = RunFolder(config) if utils.is_main() and config.SAVE else None
    model, state = build_model(config)
    val_set = get_dataset(config, 'val') if config.EVAL or config.VALIDATE_FREQ else None
    if config.EVAL:
        if folder is not None:
            folder.claim()
        metrics = _evaluate(config, amp.decorate(model)[0], val_set, amp, 'eval')
        if folder is not None:
            folder.record(event='eval', **metrics)
        return metrics
    return _train(config, device, amp, folder, model, state, val_set)


def _train(config, device, amp, folder, model, state, val_set):
    train = config.TRAIN
    world = utils.world_size()
    train_set = get_dataset(config, 'train')
    train_loader = get_dataloader(config, train_set, 'train', utils.rank(), world)
    steps_per_epoch = math.ceil(len(train_loader) / train.ACCUM_ITER)
    total_steps = steps_per_epoch * train.NUM_EPOCHS
    global_batch = config.DATA.BATCH_SIZE * train.ACCUM_ITER * world
    scale = global_batch / train.LINEAR_SCALED_LR if train.LINEAR_SCALED_LR else 1.0
    lr_at = partial(learning_rate, base_lr=train.BASE_LR * scale, start_lr=train.WARMUP_START_LR * scale,
                    end_lr=train.END_LR * scale, warmup_steps=round(train.WARMUP_EPOCHS * steps_per_epoch),
                    total_steps=total_steps)

    sync_bn = train.SYNC_BN and device == 'gpu' and world > 1
    if sync_bn:
        model = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = ModelEMA(model, train.MODEL_EMA_DECAY) if train.MODEL_EMA else None
    optimizer = build_optimizer(train.OPTIMIZER.NAME, parameter_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY),
                                betas=train.OPTIMIZER.BETAS, eps=train.OPTIMIZER.EPS)
    model, optimizer = amp.decorate(model, optimizer)
    scaler = amp.scaler()
    epochs_done, step, best = train.LAST_EPOCH, train.LAST_EPOCH * steps_per_epoch, {}
    if state is not None:
        _restore(config, state, model, ema, optimizer, scaler)
        epochs_done, step, best = state['epoch'], state['epoch'] * steps_per_epoch, state['best']
        if step != state['step']:
            logger.warning(f"the checkpoint has {state['step']} steps; with this global batch its epochs are {step}: "
                           'the learning rate goes on from there')
    wrapped = paddle.DataParallel(model) if world > 1 else model

    use_mixup = train.MIXUP_PROB > 0
    mixup = Mixup(mixup_alpha=train.MIXUP_ALPHA, cutmix_alpha=train.CUTMIX_ALPHA,
                  cutmix_minmax=list(train.CUTMIX_MINMAX) or None, prob=train.MIXUP_PROB,
                  switch_prob=train.MIXUP_SWITCH_PROB, mode=train.MIXUP_MODE, label_smoothing=train.SMOOTHING,
                  num_classes=config.MODEL.NUM_CLASSES) if use_mixup else None
    criterion = build_loss(use_mixup, train.SMOOTHING)

    logger.info(f'{config.MODEL.NAME}: {model.num_parameters():,} parameters, {config.DATA.IMAGE_SIZE} pixels')
    logger.info(f'{len(train_set)} training images, global batch {global_batch} = {config.DATA.BATCH_SIZE} x '
                f'{world} processes x {train.ACCUM_ITER} accumulated, {steps_per_epoch} steps per epoch, '
                f'{total_steps} in all, peak lr {train.BASE_LR * scale:.4g}')
    if train.RECIPE_BATCH_SIZE and global_batch != train.RECIPE_BATCH_SIZE and not train.LINEAR_SCALED_LR:
        logger.warning(f'global batch {global_batch} is not the {train.RECIPE_BATCH_SIZE} that TRAIN.BASE_LR '
                       f'{train.BASE_LR:g} is for: change TRAIN.ACCUM_ITER, or scale the rate with '
                       f'-opts TRAIN.LINEAR_SCALED_LR {train.RECIPE_BATCH_SIZE}')
    if folder is not None:
        folder.claim()
    metrics = {}
    for epoch in range(epochs_done + 1, train.NUM_EPOCHS + 1):
        train_loader.set_epoch(epoch)
        trained = train_one_epoch(
            wrapped, train_loader, criterion, optimizer, epoch=epoch, first_step=step, lr_at=lr_at, amp=amp,
            scaler=scaler, ema=ema, mixup=mixup, accum_iter=train.ACCUM_ITER, grad_clip=train.GRAD_CLIP,
            seed=config.SEED, report_freq=config.REPORT_FREQ, total_steps=total_steps)
        step += trained['steps']
        logger.info(f"epoch {epoch}/{train.NUM_EPOCHS} loss {trained['loss']:.4f} lr {trained['lr']:.3g} "
                    f"images/s {trained['images_per_s']:.1f} data wait {100 * trained['data_wait']:.0f}% "
                    f"time {_duration(trained['seconds'])} eta "
                    f"{_duration(trained['seconds'] * (train.NUM_EPOCHS - epoch))}"
                    + (f" skipped {trained['skipped']}" if trained['skipped'] else ''))
        if folder is not None:
            folder.record(event='train', epoch=epoch, step=step, **trained)
        if not sync_bn:
            average_statistics(model)
            if ema is not None:
                average_statistics(ema.module)
        if folder is not None:  # before the evaluation, which a damaged picture may end
            folder.save(_state(config, model, ema, optimizer, scaler, epoch, step, best))
        utils.barrier()  # no rank runs ahead while rank 0 writes
        improved = []
        if config.VALIDATE_FREQ and (epoch % config.VALIDATE_FREQ == 0 or epoch == train.NUM_EPOCHS):
            for key, module in (('model', model), ('model_ema', ema and ema.module)):
                if module is None:
                    continue
                metrics[key] = _evaluate(config, module, val_set, amp, key)
                if folder is not None:
                    folder.record(event='eval', epoch=epoch, step=step, weights=key, **metrics[key])
                if key not in best or metrics[key]['acc1'] > best[key]['acc1']:
                    best[key] = {'epoch': epoch, **metrics[key]}
                    improved.append(key)
        if folder is not None:
            state = _state(config, model, ema, optimizer, scaler, epoch, step, best)
            folder.save_evaluated(state, epoch, improved)
        utils.barrier()
    if folder is not None:
        folder.summary(best)
    return {'last': metrics, 'best': best}


def _evaluate(config, model, val_set, amp, name):
    loader = get_dataloader(config, val_set, 'val', utils.rank(), utils.world_size())
    metrics = evaluate(model, loader, len(val_set), amp, name)
    if name != 'eval':
        logger.info(f"evaluated {'the model' if name == 'model' else 'its moving average (EMA)'}: "
                    f"Acc@1 {metrics['acc1']:.3f}")
    if utils.is_main():
        print(accuracy_line(metrics), flush=True)
    return metrics


def build_model(config):
    """The model with the weights asked for, and the state to resume from or None.

    Merged weights build the merged form.
    """
    weights = state = None
    if config.MODEL.RESUME:
        origin = resolve_resume(config.MODEL.RESUME)
        state = checkpoint.read_run_checkpoint(origin)
        weights = state[state['weights_key']] if config.EVAL else state['model']
        if config.TRAIN.LAST_EPOCH not in (0, state['epoch']):
            raise UserError(f"{origin}: is of epoch {state['epoch']}, -last_epoch says {config.TRAIN.LAST_EPOCH}")
    elif config.MODEL.PRETRAINED:
        weights, origin = pretrained_weights(config.MODEL.PRETRAINED)
    elif config.EVAL:
        raise UserError('-eval needs weights: give -pretrained=FILE, or a name that `python zoo.py` lists')
    utils.seed_paddle(config.SEED, STREAM_INIT)  # the same initial weights on every rank
    model = build_replknet(config, merged=any('large_kernel_reparam' in name for name in weights or ()))
    if weights is not None:
        fine_tuning = state is None and not config.EVAL
        dropped = checkpoint.load_weights(model, weights, origin, drop_head=fine_tuning)
        logger.info(f'weights of {origin}')
        if dropped:
            logger.info(f"its head of {len(weights['head.bias'])} classes is dropped; the head of "
                        f'{config.MODEL.NUM_CLASSES} classes starts afresh')
    return model, state


def _state(config, model, ema, optimizer, scaler, epoch, step, best):
    """The state of a run after `epoch` epochs, for `checkpoint.save_checkpoint`."""
    state = {'model': checkpoint.model_arrays(model), 'optimizer': checkpoint.optimizer_arrays(optimizer, model),
             'epoch': epoch, 'step': step, 'best': best, 'config': config_text(config)}
    if ema is not None:
        state['model_ema'] = checkpoint.model_arrays(ema.module)
    if scaler is not None:
        state['scaler'] = {k: np.asarray(v) if isinstance(v, paddle.Tensor) else v
                           for k, v in scaler.state_dict().items()}
    return state


def _restore(config, state, model, ema, optimizer, scaler):
    path = config.MODEL.RESUME
    if state['epoch'] >= config.TRAIN.NUM_EPOCHS:
        raise UserError(f"{path}: all {state['epoch']} epochs are done; for more set TRAIN.NUM_EPOCHS")
    if ema is not None and 'model_ema' not in state:
        raise UserError(f'{path}: has no moving average; resume with -opts TRAIN.MODEL_EMA False')
    if ema is not None:
        checkpoint.load_weights(ema.module, state['model_ema'], f'{path}: model_ema')
    checkpoint.load_optimizer_arrays(optimizer, model, state['optimizer'], path)
    if scaler is not None and 'scaler' in state:
        scaler.load_state_dict({k: paddle.to_tensor(v) if isinstance(v, np.ndarray) else v
                                for k, v in state['scaler'].items()})
    logger.info(f"resumed from {path}: {state['epoch']} epochs, {state['step']} steps")
