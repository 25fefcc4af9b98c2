"""Builds the parts of a training run from its settings, and restores their state from a checkpoint."""
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Callable, Optional, Tuple

import paddle

import utils
from losses import build_loss, class_weights
from mixup import Mixup
from training.amp import Amp, LossScaler
from training.ema import ModelEMA
from training.flat import FlatParameters
from training.freezing import freeze
from training.masters import MasterWeights
from training.optim import build_optimizer, flatten, parameter_groups, updates_single_parameters
from training.run_state import RunState
from training.running_statistics import sync_batch_norm_works
from training.schedules import build_schedule, build_weight_decay
from utils import logger


@dataclass(frozen=True)
class StepSettings:
    """Settings that all optimizer steps of a run share.

    Args:
        accum_iter: micro-batches per optimizer step. The last step of an epoch may have fewer; its gradient is the mean
            over those it has.
        grad_clip, grad_clip_mode: see `optim.clip_gradients`; 0 disables clipping.
        seed: of mixup and drop path.
        report_freq: optimizer steps between progress lines.
        total_steps: optimizer steps of the whole run, for the ETA; None for those up to the end of the epoch.
    """
    accum_iter: int = 1
    grad_clip: float = 0.0
    grad_clip_mode: str = 'norm'
    seed: int = 0
    report_freq: int = 20
    total_steps: Optional[int] = None


@dataclass(frozen=True)
class TrainingParts:
    """What an epoch of training works with.

    Args:
        model: a RepLKNet, or paddle.DataParallel around one.
        criterion: callable(logits [N, K], targets) -> mean loss; targets are labels [N], or [N, K] with `mixup` or
            several labels per image.
        optimizer: Paddle optimizer over the groups of `optim.parameter_groups`.
        lr_at: learning rate as a function of the optimizer step, from 0.
        amp: mixed precision of the forward passes.
        masters: what the optimizer updates in place of weights in half precision.
        flat: the trained parameters as views of long ones; empty for those that are not.
        weight_decay_at: weight decay as a function of the optimizer step; None leaves that of the optimizer.
        scaler: loss scaling for float16, or None.
        ema: moving average of the model, or None.
        mixup: mixup and CutMix, or None.
        frozen: layers that keep their weights and statistics, see `freezing.freeze`.
        settings: what all steps share.
    """
    model: paddle.nn.Layer
    criterion: Callable
    optimizer: paddle.optimizer.Optimizer
    lr_at: Callable[[int], float]
    amp: Amp
    masters: MasterWeights = MasterWeights()
    flat: Tuple[FlatParameters, ...] = ()
    weight_decay_at: Optional[Callable[[int], float]] = None
    scaler: Optional[LossScaler] = None
    ema: Optional[ModelEMA] = None
    mixup: Optional[Mixup] = None
    frozen: Tuple[paddle.nn.Layer, ...] = ()
    settings: StepSettings = StepSettings()

    @property
    def bare_model(self):
        """The RepLKNet itself, without DataParallel."""
        return self.model._layers if isinstance(self.model, paddle.DataParallel) else self.model

    def training_mode(self):
        """Sets the model to training mode, but its frozen layers to evaluation mode."""
        self.model.train()
        for layer in self.frozen:
            layer.eval()

    @cached_property
    def trained_parameters(self):
        """Parameters that the optimizer changes; for Paddle, running statistics are parameters as well."""
        if self.flat:
            return [group.whole for group in self.flat]
        return [self.masters.by_name.get(name, parameter) for name, parameter in self.bare_model.named_parameters()
                if not parameter.stop_gradient]


def build_training(config, device, amp, start, loader, data):
    """Builds the parts of a training run; with a checkpoint in `start`, they continue from its state.

    Every rank calls it.

    Args:
        config: frozen settings.
        device: kind of device in use ('gpu', 'cpu', ...).
        amp: see `Amp`.
        start: the initial model and the checkpoint to resume, see `run.Start`.
        loader: this rank's training batches.
        data: their RunData.
    Returns:
        TrainingParts, and the RunState that saves and restores them.
    Raises:
        UserError: the checkpoint is that of a finished run, or does not fit the model or optimizer.
    """
    train, world = config.TRAIN, utils.world_size()
    steps_per_epoch = math.ceil(len(loader) / train.ACCUM_ITER)
    frozen = freeze(start.model, train.FREEZE)
    lr_at = build_schedule(config, steps_per_epoch, world)
    sync_bn = train.SYNC_BN and device == 'gpu' and world > 1
    if sync_bn and not sync_batch_norm_works(config.MODEL.RECOMPUTE):
        sync_bn = False
        logger.warning(f'TRAIN.SYNC_BN: SyncBatchNorm of Paddle {paddle.__version__} does not work here'
                       f'{" with MODEL.RECOMPUTE" * config.MODEL.RECOMPUTE}; each process normalises its own images, '
                       'and the running statistics are averaged over the processes')
    model = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(start.model) if sync_bn else start.model
    ema = ModelEMA(model, train.MODEL_EMA_DECAY) if train.MODEL_EMA else None  # in float32
    masters = amp.cast_weights(model)
    groups = parameter_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY, masters.by_name)
    flat, groups = flatten(train.OPTIMIZER.NAME, groups, model, masters.by_name, device)
    optimizer = build_optimizer(train.OPTIMIZER.NAME, groups, betas=train.OPTIMIZER.BETAS, eps=train.OPTIMIZER.EPS)
    parts = TrainingParts(
        model=model, criterion=_build_criterion(config, data), optimizer=optimizer, lr_at=lr_at, amp=amp,
        masters=masters, flat=tuple(flat),
        weight_decay_at=build_weight_decay(config, lr_at.total_steps), scaler=amp.scaler(), ema=ema,
        mixup=build_mixup(config), frozen=frozen, settings=StepSettings(
            accum_iter=train.ACCUM_ITER, grad_clip=train.GRAD_CLIP, grad_clip_mode=train.GRAD_CLIP_MODE,
            seed=config.SEED, report_freq=config.REPORT_FREQ, total_steps=lr_at.total_steps))
    state = RunState(config, model, ema, optimizer, parts.scaler, steps_per_epoch, masters=masters.by_name,
                     flat=() if updates_single_parameters(train.OPTIMIZER.NAME, device) else flat,
                     own_statistics=world > 1 and not sync_bn, data=data.identity)

    if start.checkpoint is not None:
        state.restore(start.checkpoint, start.origin)
    if world > 1:
        parts = replace(parts, model=paddle.DataParallel(model))
    if start.checkpoint is not None:
        state.restore_statistics(start.checkpoint)
    _log_setup(config, state, lr_at, images=len(loader.dataset))
    return parts, state


def _build_criterion(config, data):
    train, weights = config.TRAIN, None
    if train.CLASS_WEIGHTS:
        weights = class_weights(data.train.labels, config.MODEL.NUM_CLASSES, train.CLASS_WEIGHTS)
    return build_loss(train.LOSS, mixup=train.MIXUP_PROB > 0, smoothing=train.SMOOTHING, aug_splits=train.AUG_SPLITS,
                      bce_threshold=train.BCE_THRESHOLD, jsd_alpha=train.JSD_ALPHA,
                      gamma_neg=train.ASYMMETRIC.GAMMA_NEG, gamma_pos=train.ASYMMETRIC.GAMMA_POS,
                      clip=train.ASYMMETRIC.CLIP, weights=weights, multi_label=config.DATA.MULTI_LABEL)


def build_mixup(config):
    """The mixup and CutMix of the settings, or None."""
    train = config.TRAIN
    if not train.MIXUP_PROB:
        return None
    return Mixup(mixup_alpha=train.MIXUP_ALPHA, cutmix_alpha=train.CUTMIX_ALPHA,
                 cutmix_minmax=list(train.CUTMIX_MINMAX) or None, prob=train.MIXUP_PROB,
                 switch_prob=train.MIXUP_SWITCH_PROB, mode=train.MIXUP_MODE, label_smoothing=train.SMOOTHING,
                 num_classes=config.MODEL.NUM_CLASSES)


def _log_setup(config, state, lr_at, images):
    train, batch = config.TRAIN, state.global_batch
    logger.info(f'{config.MODEL.NAME}: {state.model.num_parameters():,} parameters, {config.DATA.IMAGE_SIZE} pixels')
    logger.info(f'{images} training images, global batch {batch} = {config.DATA.BATCH_SIZE} x {utils.world_size()} '
                f'processes x {train.ACCUM_ITER} accumulated, {state.steps_per_epoch} steps per epoch, '
                f'{lr_at.total_steps} in all, peak lr {lr_at.base_lr:.4g}')
