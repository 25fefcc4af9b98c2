"""Exponential moving average of a model: its weights and batch-norm statistics."""
import copy

import paddle

from training.flat import gathered, move, views


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
        self._followed, self._pairs, self._statistics = None, [], ([], [])

    @paddle.no_grad()
    def update(self, model, masters=None, flat=()):
        """Moves the average towards `model`; to be called after every optimizer step that was not skipped.

        Args:
            model: the model itself.
            masters: {name: float32 parameter} to follow in place of its weights of these names.
            flat: the FlatParameters of its trained parameters; those not in them are followed one by one.
        """
        if self._followed is not model:  # collecting a state dict of hundreds of tensors takes longer than the update
            self._followed, self._share = model, paddle.to_tensor(1 - self.decay, dtype='float32')
            self._pairs = self._pair({**model.state_dict(), **(masters or {})}, flat)
        else:  # Paddle may have replaced one
            move(*self._statistics)
        for average, value in self._pairs:
            average.lerp_(value if value.dtype == average.dtype else value.astype(average.dtype), self._share)

    def _pair(self, source, flat):
        """Pairs of an average and what it follows, long ones where there are FlatParameters."""
        averages = self.module.state_dict()
        if not flat:
            return [(average, source[name]) for name, average in averages.items()]
        pairs = [(gathered([averages.pop(name) for name in group.members]), group.whole) for group in flat]
        rest = [name for name in averages if source[name].dtype == averages[name].dtype == paddle.float32]
        if rest:
            followed = [source[name] for name in rest]
            whole = gathered(followed)
            pairs.append((gathered([averages[name] for name in rest]), whole))
            self._statistics = followed, views(whole, [value.shape for value in followed])
        return pairs + [(averages[name], source[name]) for name in averages if name not in rest]
