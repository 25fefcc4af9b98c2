"""Exponential moving average of a model: its weights and batch-norm statistics."""
import copy

import paddle


class ModelEMA:
    """A copy of a model that follows its weights: ema = decay * ema + (1 - decay) * model.

    Args:
        model: the model to follow, before mixed precision casts its weights to half.
        decay: share of the average that an update keeps; the paper's 0.9999 is per optimizer step.
    Attributes:
        module: the averaged model, in evaluation mode.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.module = copy.deepcopy(model)
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.stop_gradient = True
        self._followed, self._pairs = None, []

    @paddle.no_grad()
    def update(self, model, masters=None):
        """Moves the average towards `model`; to be called after every optimizer step that was not skipped.

        `masters`, {name: float32 parameter}, are followed in place of its weights of these names.
        """
        if self._followed is not model:  # collecting a state dict of hundreds of tensors takes longer than the update
            source = {**model.state_dict(), **(masters or {})}
            self._followed, self._share = model, paddle.to_tensor(1 - self.decay, dtype='float32')
            self._pairs = [(average, source[name]) for name, average in self.module.state_dict().items()]
        for average, value in self._pairs:
            average.lerp_(value if value.dtype == average.dtype else value.astype(average.dtype), self._share)
