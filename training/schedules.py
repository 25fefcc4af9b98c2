"""Learning rate and weight decay as pure functions of the optimizer step, which makes them easy to plot.

    lr_at = build_schedule(config, steps_per_epoch, world)
    rates = [lr_at(step) for step in range(lr_at.total_steps)]
"""
import dataclasses
import math
from typing import Tuple


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up from `start_lr` to `base_lr`, decay down to `end_lr`, cool-down at `end_lr`.

    Args:
        base_lr, start_lr, end_lr: learning rates.
        total_steps, warmup_steps, cooldown_steps: optimizer steps; the total includes warm-up and cool-down.
        name: the decay between warm-up and cool-down. 'cosine' and 'polynomial' (of degree `power`) go from `base_lr`
            to `end_lr`. 'step' multiplies by `decay_rate` every `decay_steps` steps, 'exponential' does so
            continuously, and 'multistep' at each of `milestones` (steps of the run); none of the three goes below
            `end_lr`. 'constant' stays at `base_lr`.
    """
    base_lr: float
    start_lr: float
    end_lr: float
    total_steps: int
    warmup_steps: int = 0
    cooldown_steps: int = 0
    name: str = 'cosine'
    decay_steps: int = 1
    decay_rate: float = 0.1
    milestones: Tuple[int, ...] = ()
    power: float = 1.0

    def __call__(self, step):
        """The learning rate of optimizer step `step`, counted from 0; defined beyond the last step as well."""
        if step < self.warmup_steps:
            return self.start_lr + (self.base_lr - self.start_lr) * step / self.warmup_steps
        decay_end = self.total_steps - self.cooldown_steps
        if self.cooldown_steps and step >= decay_end:
            return self.end_lr
        done = step - self.warmup_steps
        progress = min(1.0, done / max(1, decay_end - self.warmup_steps))
        if self.name == 'constant':
            return self.base_lr
        if self.name == 'cosine':
            return _cosine(self.base_lr, self.end_lr, progress)
        if self.name == 'polynomial':
            return self.end_lr + (self.base_lr - self.end_lr) * (1 - progress) ** self.power
        decays = {'step': done // self.decay_steps, 'exponential': done / self.decay_steps,
                  'multistep': sum(step >= milestone for milestone in self.milestones)}[self.name]
        return max(self.end_lr, self.base_lr * self.decay_rate ** decays)


def build_schedule(config, steps_per_epoch, world):
    """The learning-rate schedule of a run.

    Args:
        config: settings.
        steps_per_epoch: optimizer steps per epoch.
        world: number of processes; with TRAIN.LINEAR_SCALED_LR, the rates are scaled to the resulting global batch.
    Returns:
        a Schedule.
    """
    train, decay = config.TRAIN, config.TRAIN.LR_SCHEDULER
    scale = 1.0
    if train.LINEAR_SCALED_LR:
        scale = config.DATA.BATCH_SIZE * train.ACCUM_ITER * world / train.LINEAR_SCALED_LR

    def steps(epochs):
        return round(epochs * steps_per_epoch)

    return Schedule(
        base_lr=train.BASE_LR * scale, start_lr=train.WARMUP_START_LR * scale, end_lr=train.END_LR * scale,
        total_steps=steps(train.NUM_EPOCHS), warmup_steps=steps(train.WARMUP_EPOCHS),
        cooldown_steps=steps(train.COOLDOWN_EPOCHS), name=decay.NAME, decay_steps=max(1, steps(decay.DECAY_EPOCHS)),
        decay_rate=decay.DECAY_RATE, milestones=tuple(steps(epoch) for epoch in decay.MILESTONES), power=decay.POWER)


def build_weight_decay(config, total_steps):
    """Weight decay as a function of the optimizer step: constant, or a cosine to TRAIN.WEIGHT_DECAY_END over the run.

    Args:
        config: settings.
        total_steps: optimizer steps of the run.
    """
    start, end = config.TRAIN.WEIGHT_DECAY, config.TRAIN.WEIGHT_DECAY_END
    return lambda step: start if end < 0 else _cosine(start, end, min(1.0, step / total_steps))


def _cosine(start, end, progress):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
