"""Automatic mixed precision: autocast, half-precision weights (O2) and dynamic loss scaling."""
import paddle

import utils
from errors import UserError
from large_kernel import bf16_products, build, fastest_precision
from training.masters import MasterWeights
from training.optim import change_gradients


class Amp:
    """Mixed precision according to the settings AMP, AMP_DTYPE, AMP_LEVEL, AMP_LOSS_SCALE and AMP_LOSS_SCALE_STEPS.

    Paddle's autocast has no effect on the CPU. There 1x1 convolutions are trained with products in bfloat16, see
    `large_kernel.bf16_products`, and the log says so once; evaluations are in float32.
    """

    def __init__(self, config, device):
        self.enabled = config.AMP and device != 'cpu'
        self.level, self.dtype = config.AMP_LEVEL, config.AMP_DTYPE
        self.loss_scale, self.loss_scale_steps = config.AMP_LOSS_SCALE, config.AMP_LOSS_SCALE_STEPS
        self.bf16_products = not self.enabled and bf16_on_cpu(config)
        if config.AMP and not self.enabled:
            utils.log_once('-amp: ' + on_cpu(config))

    def facts(self):
        """Facts for `agreement.agree`: processors that differ must not multiply differently."""
        return {'the precision of 1x1 convolutions (the same everywhere with AMP_DTYPE bfloat16)':
                'bfloat16' if self.bf16_products else 'float32'}

    def autocast(self):
        """Context manager for a forward pass."""
        if not self.enabled:
            return bf16_products(self.bf16_products)
        return paddle.amp.auto_cast(enable=self.enabled, level=self.level, dtype=self.dtype)

    def cast_weights(self, model):
        """Casts the weights to half precision under O2, in place; returns the MasterWeights for the optimizer."""
        if not self.enabled or self.level != 'O2':
            return MasterWeights()
        return MasterWeights(model, lambda model: paddle.amp.decorate(models=model, level='O2', dtype=self.dtype))

    def scaler(self):
        """A LossScaler for float16; None for other dtypes, which do not need one."""
        if self.enabled and self.dtype == 'float16':
            return LossScaler(self.loss_scale, self.loss_scale_steps)
        return None


def bf16_on_cpu(config):
    """Whether -amp means products in bfloat16 on this machine's CPU.

    It does where the processor has instructions for them; elsewhere, where they are slower than float32, only if the
    settings ask for AMP_DTYPE bfloat16.
    """
    asked = config.AMP and not config.EVAL and (config.AMP_DTYPE == 'bfloat16' or fastest_precision() == 'bf16')
    return asked and build.reason_unavailable() is None


def on_cpu(config):
    """What -amp does on the CPU, in one line."""
    if config.EVAL:
        return 'evaluations on the CPU are in float32'
    if bf16_on_cpu(config):
        slow = '' if fastest_precision() == 'bf16' else ', slower than in float32 on this processor'
        return f'1x1 convolutions are trained with products in bfloat16{slow}; all else is in float32'
    if build.reason_unavailable() is not None:
        return f'computing in float32, because the C++ operator is not available: {build.reason_unavailable()}'
    return 'computing in float32, because this processor, or the compiler, has no instructions for bfloat16'


def check_card(config, device):
    """Refuses -amp under O2, and warns of it under O1, where Paddle's autocast does not work on this rank's GPU.

    Raises:
        UserError: weights would be cast to a type in which autocast does not compute.
    """
    if not config.AMP or device != 'gpu':
        return
    capability = paddle.device.cuda.get_device_capability()
    needed, cards = {'float16': (7, 'Volta'), 'bfloat16': (8, 'Ampere')}[config.AMP_DTYPE]
    if capability[0] >= needed:
        return
    problem = (f'AMP_DTYPE {config.AMP_DTYPE} needs compute capability {needed}.0 ({cards}) or newer; this card has '
               f'{".".join(map(str, capability))}')
    if config.AMP_LEVEL == 'O2':
        raise UserError(f'{problem}: {"set AMP_DTYPE float16, or " if capability[0] >= 7 else ""}leave out -amp')
    utils.logger.warning(f'{problem}: computing in float32')


class LossScaler:
    """Dynamic loss scaling: multiplies the loss, divides the gradients, and adapts the factor.

    It replaces Paddle's GradScaler, which fails on an overflow with NumPy 2.4 and does nothing on the CPU.

    Args:
        scale: initial factor. A step whose gradients overflow halves it, down to 1.
        growth_steps: after this many steps in a row without overflow, the factor doubles.
    Attributes:
        value: current factor.
        good_steps: steps without overflow since the factor last changed.
    """

    def __init__(self, scale=65536.0, growth_steps=2000):
        self.value, self.growth_steps = scale, growth_steps
        self.good_steps = 0

    def scale(self, loss):
        """The loss to call `backward` on."""
        return loss * self.value

    def unscale(self, parameters):
        """Divides the gradients by the factor, in place."""
        change_gradients(parameters, lambda gradient: gradient.scale_(1 / self.value))

    def update(self, finite):
        """Adapts the factor after a step, given whether its gradients were finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == self.growth_steps:
            self.value, self.good_steps = self.value * 2, 0

    def state_dict(self):
        return {'scale': self.value, 'good_steps': self.good_steps}

    def load_state_dict(self, state):
        self.value, self.good_steps = state['scale'], state['good_steps']
