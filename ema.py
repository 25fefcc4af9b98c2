"""Exponential moving average of a model: weights and batch-norm statistics."""
import copy

import paddle


class ModelEMA:
    """A second model whose weights follow the first one's: ema = decay * ema + (1 - decay) * model.

    Args:
        model: the model to follow, before mixed precision turns its weights to half.
        decay: per update; the recipe's 0.9999 is meant for one update per optimizer step.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.module = copy.deepcopy(model)
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.stop_gradient = True

    @paddle.no_grad()
    def update(self, model):
        """Call once after every optimizer step that was not skipped."""
        source = model.state_dict()
        for name, average in self.module.state_dict().items():
            value = source[name].astype(average.dtype)
            # average + (1 - decay) * (value - average), in place
            average.lerp_(value, 1 - self.decay) if average.is_floating_point() else average.set_value(value)
