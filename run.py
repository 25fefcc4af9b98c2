"""A run from its settings to its last checkpoint: ties the parts together."""
import math
from functools import partial

import paddle

import checkpoint
import utils
from config import config_text
from datasets import get_dataloader, get_dataset
from ema import ModelEMA
from engine import Amp, accuracy_line, average_statistics, duration, evaluate, train_one_epoch
from errors import UserError
from losses import build_loss
from mixup import Mixup
from monitor import curves_line
from optim import build_optimizer, parameter_groups
from replknet import build_replknet
from run_folder import RunFolder, resolve_resume
from schedules import build_schedule, build_weight_decay
from utils import logger
from zoo import pretrained_weights

STREAM_INIT = 3  # of random draws, beside those of engine.py


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
    lr_at = build_schedule(config, steps_per_epoch, world)
    global_batch = config.DATA.BATCH_SIZE * train.ACCUM_ITER * world

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
    criterion = build_loss(train.LOSS, mixup=use_mixup, smoothing=train.SMOOTHING, aug_splits=train.AUG_SPLITS,
                           bce_threshold=train.BCE_THRESHOLD, jsd_alpha=train.JSD_ALPHA,
                           gamma_neg=train.ASYMMETRIC.GAMMA_NEG, gamma_pos=train.ASYMMETRIC.GAMMA_POS,
                           clip=train.ASYMMETRIC.CLIP)

    logger.info(f'{config.MODEL.NAME}: {model.num_parameters():,} parameters, {config.DATA.IMAGE_SIZE} pixels')
    logger.info(f'{len(train_set)} training images, global batch {global_batch} = {config.DATA.BATCH_SIZE} x '
                f'{world} processes x {train.ACCUM_ITER} accumulated, {steps_per_epoch} steps per epoch, '
                f'{lr_at.total_steps} in all, peak lr {lr_at.base_lr:.4g}')
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
            grad_clip_mode=train.GRAD_CLIP_MODE, weight_decay_at=build_weight_decay(config, lr_at.total_steps),
            seed=config.SEED, report_freq=config.REPORT_FREQ, total_steps=lr_at.total_steps,
            on_report=None if folder is None else partial(folder.record, event='step'))
        step += trained['steps']
        logger.info(f"epoch {epoch}/{train.NUM_EPOCHS} loss {trained['loss']:.4f} lr {trained['lr']:.3g} "
                    f"images/s {trained['images_per_s']:.1f} data wait {100 * trained['data_wait']:.0f}% "
                    f"time {duration(trained['seconds'])} eta "
                    f"{duration(trained['seconds'] * (train.NUM_EPOCHS - epoch))}"
                    + (f" skipped {trained['skipped']}" if trained['skipped'] else ''))
        if folder is not None:
            folder.record(event='train', epoch=epoch, step=step, processes=world, **trained)
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
        if config.CURVES:
            logger.info(curves_line(folder.path))
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
        state['scaler'] = scaler.state_dict()
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
        scaler.load_state_dict(state['scaler'])
    logger.info(f"resumed from {path}: {state['epoch']} epochs, {state['step']} steps")
