"""Automatic mixed precision: autocast, O2 weights and dynamic loss scaling."""
import paddle

import utils
from training.optim import change_gradients


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


class LossScaler:
    """Multiplies the loss, divides the gradients, and adapts the factor.

    Paddle's GradScaler is not used: at an overflow it fails with numpy 2.4 and prints, and on the CPU it is off.
    Args:
        scale: first factor; a step whose gradients overflow halves it, down to 1.
        growth_steps: steps in a row without overflow after which it doubles.
    """

    def __init__(self, scale=65536.0, growth_steps=2000):
        self.value, self.growth_steps = scale, growth_steps
        self.good_steps = 0  # in a row

    def scale(self, loss):
        """The loss to go backward from."""
        return loss * self.value

    def unscale(self, parameters):
        """Gradients of the scaled loss become those of the loss, in place."""
        change_gradients(parameters, lambda gradient: gradient.scale_(1 / self.value))

    def update(self, finite):
        """Adapts the factor after a step whose gradients were finite, or were not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == self.growth_steps:
            self.value, self.good_steps = self.value * 2, 0

    def state_dict(self):
        return {'scale': self.value, 'good_steps': self.good_steps}

    def load_state_dict(self, state):
        self.value, self.good_steps = state['scale'], state['good_steps']
