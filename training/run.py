"""A run from its settings to its last checkpoint: ties the parts together."""
import math
import time
from functools import partial

import paddle

import utils
from datasets import get_dataloader, get_dataset
from errors import TrainingStopped, UserError
from fuse import pack
from large_kernel import operator_serves
from losses import build_loss
from mixup import Mixup
from run_folder.curves import curves_line
from run_folder.resume import read_resumed
from run_folder.writer import RunFolder
from training.amp import Amp
from training.ema import ModelEMA
from training.engine import evaluate, train_one_epoch
from training.optim import build_optimizer, parameter_groups
from training.progress import duration
from training.run_state import RunState, refuse_other_run
from training.running_statistics import average_statistics
from training.schedules import build_schedule, build_weight_decay
from training.signals import stop
from utils import accuracy_line, logger
from zoo import build_model, pretrained_weights

STREAM_INIT = 3  # of random draws, beside those of engine.py


def run(config, device):
    """Evaluates, or trains with evaluation, as the settings say; every rank calls it.

    Args:
        config: frozen settings; `config.SAVE` names the run folder.
        device: kind of the device in use ('gpu', 'cpu', ...).
    Returns:
        dict of the last evaluation's metrics, and for a training run of the best ones.
    Raises:
        UserError, FileNotFoundError: what the user gave cannot be used.
        TrainingStopped: training cannot go on.
        Interrupted: a signal came; within an epoch the state was saved after the step.
    """
    amp = Amp(config, device)
    folder = RunFolder(config) if utils.is_main() and config.SAVE else None
    if folder is not None and folder.own:
        folder.lock()
    model, resumed = build_start(config)
    val_set = get_dataset(config, 'val') if config.EVAL or config.VALIDATE_FREQ else None
    if config.EVAL:
        if folder is not None:
            folder.claim()
        model, _ = amp.decorate(model)
        metrics = _evaluate(config, pack(model) if operator_serves() else model, val_set, amp, 'eval')
        if folder is not None:
            folder.record(event='eval', **metrics)
        return metrics
    return _train(config, device, amp, folder, model, resumed, val_set)


def _train(config, device, amp, folder, model, resumed, val_set):
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
    run_state = RunState(config, model, ema, optimizer, scaler, steps_per_epoch, global_batch,
                         own_statistics=world > 1 and not sync_bn)
    path, state = resumed or (None, None)
    if state is not None:
        run_state.restore(state, path)
    if len(set(utils.all_gather_values(run_state.step))) > 1:
        raise UserError(f'{config.SAVE}: the processes see different checkpoints; several '
                        'machines need a folder that all of them share')
    wrapped = paddle.DataParallel(model) if world > 1 else model
    if state is not None:
        run_state.restore_statistics(state)

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
        folder.claim(state['metrics_bytes'] if folder.own and state is not None else 0)
    del state, resumed  # as large as the model, its average and the optimizer together

    def votes():
        due = folder is not None and config.SAVE_MINUTES and (
            time.monotonic() - folder.saved_at > 60 * config.SAVE_MINUTES)
        return stop.asked, due

    def after_step(asked, due):
        if run_state.epoch_trained:  # is saved in a moment
            return
        if asked or due or (config.SAVE_STEPS and run_state.step % config.SAVE_STEPS == 0):
            _save(folder, run_state)
        if asked:
            saved = 'not saved' if folder is not None and folder.unsaved else 'saved'
            stop.interrupt(f' after step {run_state.step} (epoch {run_state.epochs + 1}), {saved}; go on with '
                           f'-resume={config.SAVE}')

    metrics = {}
    while run_state.epochs < train.NUM_EPOCHS:
        epoch = run_state.epochs + 1
        if not run_state.epoch_trained:
            with stop.deferred():
                train_loader.set_epoch(epoch, run_state.sums['steps'] * train.ACCUM_ITER)
                trained = train_one_epoch(
                    wrapped, train_loader, criterion, optimizer, epoch=epoch,
                    first_step=run_state.epochs * steps_per_epoch, lr_at=lr_at, amp=amp, scaler=scaler, ema=ema,
                    mixup=mixup, accum_iter=train.ACCUM_ITER, grad_clip=train.GRAD_CLIP,
                    grad_clip_mode=train.GRAD_CLIP_MODE, weight_decay_at=build_weight_decay(config, lr_at.total_steps),
                    seed=config.SEED, report_freq=config.REPORT_FREQ, total_steps=lr_at.total_steps,
                    on_report=None if folder is None else partial(folder.record, event='step'), sums=run_state.sums,
                    votes=votes, after_step=after_step)
                logger.info(f"epoch {epoch}/{train.NUM_EPOCHS} loss {trained['loss']:.4f} lr {trained['lr']:.3g} "
                            f"images/s {trained['images_per_s']:.1f} data wait {100 * trained['data_wait']:.0f}% "
                            f"time {duration(trained['seconds'])} eta "
                            f"{duration(trained['seconds'] * (train.NUM_EPOCHS - epoch))}"
                            + (f" skipped {trained['skipped']}" if trained['skipped'] else ''))
                if folder is not None:
                    folder.record(event='train', epoch=epoch, step=run_state.step, processes=world, **trained)
                if not sync_bn:
                    average_statistics(model)
                    if ema is not None:
                        average_statistics(ema.module)
                _save(folder, run_state)  # before the evaluation, which a damaged picture may end
        improved, accuracies = [], {}
        if config.VALIDATE_FREQ and (epoch % config.VALIDATE_FREQ == 0 or epoch == train.NUM_EPOCHS):
            for key, module in (('model', model), ('model_ema', ema and ema.module)):
                if module is None:
                    continue
                metrics[key] = _evaluate(config, module, val_set, amp, key)
                accuracies[key] = metrics[key]['acc1']
                if folder is not None:
                    folder.record(event='eval', epoch=epoch, step=run_state.step, weights=key, **metrics[key])
                if key not in run_state.best or accuracies[key] > run_state.best[key]['acc1']:
                    run_state.best[key] = {'epoch': epoch, **metrics[key]}
                    improved.append(key)
        with stop.deferred():
            run_state.end_epoch()
            captured = run_state.capture()
            if folder is not None:
                folder.save_evaluated(captured, accuracies, improved)
            utils.barrier()
    if folder is not None:
        folder.summary(run_state.best, run_state.numbered)
        if config.CURVES:
            logger.info(curves_line(folder.path))
        if folder.unsaved:
            raise TrainingStopped(f'the run is over, but its end could not be saved: {folder.unsaved}')
    return {'last': metrics, 'best': run_state.best}


def _save(folder, run_state):
    """Saves the state to resume from; every rank calls it, and none runs ahead while rank 0 writes."""
    state = run_state.capture()
    if folder is not None:
        folder.save_last(state)
    utils.barrier()


def _evaluate(config, model, val_set, amp, name):
    loader = get_dataloader(config, val_set, 'val', utils.rank(), utils.world_size())
    metrics = evaluate(model, loader, len(val_set), amp, name)
    if name != 'eval':
        logger.info(f"evaluated {'the model' if name == 'model' else 'its moving average (EMA)'}: "
                    f"Acc@1 {metrics['acc1']:.3f}")
    if utils.is_main():
        print(accuracy_line(metrics), flush=True)
    return metrics


def build_start(config):
    """The model a run starts with, and the checkpoint it resumes from, (file, state), or None.

    In this order: the checkpoint of -resume, the weights of -pretrained, initial weights from the seed.
    """
    state = weights = origin = None
    if config.MODEL.RESUME:
        origin, state = read_resumed(config.MODEL.RESUME)
        if not config.EVAL:
            refuse_other_run(config, state, origin)
        weights = state[state['weights_key']] if config.EVAL else state['model']
        if config.TRAIN.LAST_EPOCH not in (0, state['epoch']):
            raise UserError(f"{origin}: is of epoch {state['epoch']}, -last_epoch says {config.TRAIN.LAST_EPOCH}")
    elif config.MODEL.PRETRAINED:
        weights, origin = pretrained_weights(config.MODEL.PRETRAINED)
    elif config.EVAL:
        raise UserError('-eval needs weights: give -pretrained=FILE, or a name that `python zoo.py` lists')
    utils.seed_paddle(config.SEED, STREAM_INIT)  # the same initial weights on every rank
    model = build_model(config, weights, origin, drop_head=state is None and not config.EVAL)
    return model, (origin, state) if state is not None else None
