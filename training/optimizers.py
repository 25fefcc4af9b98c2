"""Optimizers that Paddle lacks, has in some versions only, or cannot run with a weight decay per parameter group.

The updates work in place: on the CPU, allocating a tensor the size of the weight takes longer than the arithmetic.
"""
import paddle


class _DecoupledOptimizer(paddle.optimizer.Optimizer):
    """Base class of optimizers written with tensor operations, whose weight decay acts on the weight.

    A subclass names its state, and updates the state and the weight in place.

    Args:
        parameters: groups of `optim.parameter_groups`.
        betas, eps: constants of the update.
    """
    _MOMENTS = ()  # names of state tensors with the shape of the weight, initially 0
    _COUNTERS = {'step': 0.0}  # float64 state, {name: initial value}; kept on the device, so that reading never waits

    def __init__(self, parameters, betas, eps):
        super().__init__(learning_rate=0.0, parameters=parameters)
        self._betas, self._eps = betas, eps

    def append_regularization_ops(self, parameters_and_grads, regularization=None):
        return parameters_and_grads  # the base class would add the decay to the gradients

    def _create_accumulators(self, block, group):
        for parameter in group['params']:
            for name in self._MOMENTS:
                self._add_accumulator(name, parameter)
            for name, start in self._COUNTERS.items():
                self._add_accumulator(name, parameter, dtype='float64', fill_value=start, shape=[1])

    def _append_optimize_op(self, block, group):
        weight, gradient = group['params']
        state = {name: self._get_accumulator(name, weight) for name in (*self._MOMENTS, *self._COUNTERS)}
        paddle.increment(state['step'])
        rate = self.get_lr() * weight.optimize_attr['learning_rate']
        self._update(weight, gradient, rate, group['weight_decay'], state)

    def _update(self, weight, gradient, rate, decay, state):
        """Updates `weight` and `state` in place; `state` holds _MOMENTS, then _COUNTERS; its 'step' starts at 1."""
        raise NotImplementedError

    def _root(self, moment, correction):
        """sqrt(moment / correction) + eps."""
        return (moment / _as(moment, correction)).sqrt_().scale_(1.0, self._eps)


class NAdam(_DecoupledOptimizer):
    """Adam with Nesterov momentum (Dozat 2016); the momentum at step t is beta1 * (1 - 0.5 * 0.96 ** (t / 250))."""
    _MOMENTS = ('moment1', 'moment2')
    _COUNTERS = {'step': 0.0, 'momentum_product': 1.0}

    def _update(self, weight, gradient, rate, decay, state):
        beta1, beta2 = self._betas
        moment1, moment2, step, momentum_product = state.values()
        momentum, next_momentum = (beta1 * (1 - 0.5 * 0.96 ** (t / 250)) for t in (step, step + 1))
        momentum_product.multiply_(momentum)
        moment1.lerp_(gradient, 1 - beta1)
        moment2.lerp_(gradient * gradient, 1 - beta2)
        change = moment1 * _as(weight, next_momentum / (1 - momentum_product * next_momentum))
        change.add_(gradient * _as(weight, (1 - momentum) / (1 - momentum_product)))
        change.divide_(self._root(moment2, 1 - beta2 ** step))
        weight.scale_(1 - rate * decay)
        weight.subtract_(change.scale_(rate))


class Lion(_DecoupledOptimizer):
    """Steps in the direction of the sign of an interpolated momentum (arXiv 2302.06675)."""
    _MOMENTS = ('moment',)

    def _update(self, weight, gradient, rate, decay, state):
        beta1, beta2 = self._betas
        moment, _ = state.values()
        change = paddle.lerp(gradient, moment, beta1).sign()
        weight.scale_(1 - rate * decay)
        weight.subtract_(change.scale_(rate))
        moment.lerp_(gradient, 1 - beta2)


class Adan(_DecoupledOptimizer):
    """Adaptive Nesterov momentum from gradient differences (arXiv 2208.06677), with bias correction.

    `betas` are the shares that the three averages keep, one minus those of the paper: 0.98, 0.92, 0.99 for its 0.02,
    0.08, 0.01.
    """
    _MOMENTS = ('moment1', 'difference', 'moment2', 'last_gradient')

    def _update(self, weight, gradient, rate, decay, state):
        beta1, beta2, beta3 = self._betas
        moment1, difference, moment2, last_gradient, step = state.values()
        new = (gradient - last_gradient).multiply_(_as(weight, step > 1))
        moment1.lerp_(gradient, 1 - beta1)
        difference.lerp_(new, 1 - beta2)
        new.scale_(beta2).add_(gradient)
        moment2.lerp_(new.multiply_(new), 1 - beta3)
        change = moment1 / _as(weight, 1 - beta1 ** step)
        change.add_(difference * _as(weight, beta2 / (1 - beta2 ** step)))
        change.divide_(self._root(moment2, 1 - beta3 ** step))
        weight.subtract_(change.scale_(rate))
        weight.scale_(1 / (1 + rate * decay))
        paddle.assign(gradient, output=last_gradient)


class Lamb(paddle.optimizer.Lamb):
    """Paddle's LAMB (arXiv 1904.00962) with a weight decay per parameter group; without decay, a group uses Adam."""

    def append_regularization_ops(self, parameters_and_grads, regularization=None):
        return parameters_and_grads

    def _update_param_group(self, group):
        parameters = super()._update_param_group(group)
        self._lamb_weight_decay = group['weight_decay']
        return parameters


def _as(tensor, number):
    return number.astype(tensor.dtype)
