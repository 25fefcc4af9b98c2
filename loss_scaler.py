"""Dynamic loss scaling, which keeps small gradients from vanishing in float16."""
from optim import change_gradients


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
