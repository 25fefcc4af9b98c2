"""Parameters, gradients and averages as views of a few long tensors, so that one operator updates all of them.

An operator costs 10 to 30 us of Python and dispatch, also on a GPU, whatever its tensor's length; RepLKNet-31B has 562
trained parameters.
"""
import math
from typing import NamedTuple

import paddle

ALIGNMENT = 64  # elements: 256 bytes, the alignment that GPU kernels prefer
SCALARS = ('beta1_pow_acc_0', 'beta2_pow_acc_0', 'step_0', 'momentum_product_0')  # optimizer states that are scalars


def _padded(shape):
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


class View(NamedTuple):
    """Part of a long tensor, and its address, which takes 2 us to read from a tensor."""
    tensor: paddle.Tensor
    address: int


def views(whole, shapes):
    """Views of these shapes of a long tensor, one after the other."""
    found, start = [], 0
    for shape in shapes:
        view = whole._slice(start, start + math.prod(shape))
        view.get_tensor()._set_dims(shape)
        found.append(View(view, view.data_ptr()))
        start += _padded(shape)
    return found


@paddle.no_grad()
def move(tensors, targets):
    """Makes tensors share the memory of `targets`, Views of the same shapes, without changing their values."""
    for tensor, target in zip(tensors, targets):
        if tensor.data_ptr() != target.address:
            paddle.assign(tensor, output=target.tensor)
            target.tensor._share_buffer_to(tensor)


def gathered(tensors):
    """Makes tensors views of one long float32 tensor, and returns it."""
    whole = paddle.zeros([sum(_padded(tensor.shape) for tensor in tensors)])
    move(tensors, views(whole, [tensor.shape for tensor in tensors]))
    return whole


class FlatParameters:
    """A group of float32 parameters as views of one long parameter, and their gradients as views of its gradient.

    Args:
        members: {structured name: parameter}.
    Attributes:
        whole: the long parameter, for an optimizer whose update treats all elements alike.
    """

    def __init__(self, members):
        self.members = dict(members)
        self._shapes = [parameter.shape for parameter in self.members.values()]
        self.whole = paddle.create_parameter([sum(map(_padded, self._shapes))], 'float32',
                                             default_initializer=paddle.nn.initializer.Constant(0.0))
        self._weights = views(self.whole, self._shapes)
        self.whole.grad = paddle.zeros_like(self.whole)
        self._gradients = views(self.whole.grad, self._shapes)
        move(self.members.values(), self._weights)
        self._unused = []

    @paddle.no_grad()
    def collect(self):
        """Copies what is not a view (yet): the gradients of a first backward pass, and weights that Paddle replaced.

        Weights without a gradient are remembered for `keep_unused`.
        """
        move(self.members.values(), self._weights)
        gradients = [parameter.grad for parameter in self.members.values()]
        self._unused = [(view.tensor, view.tensor.clone()) for gradient, view in zip(gradients, self._weights)
                        if gradient is None]
        move((gradient for gradient in gradients if gradient is not None),
             (view for gradient, view in zip(gradients, self._gradients) if gradient is not None))

    @paddle.no_grad()
    def keep_unused(self):
        """Gives the weights that no loss depends on their values back, after a step of the optimizer, which decays all.

        An optimizer of single parameters leaves them out.
        """
        for weight, value in self._unused:
            paddle.assign(value, output=weight)

    def unpacked(self, state):
        """An optimizer's state dict, with the entries of the members in place of those of `whole`."""
        found = {}
        for key, tensor in state.items():
            if not key.startswith(f'{self.whole.name}_'):
                found[key] = tensor
                continue
            kind = key[len(self.whole.name) + 1:]
            parts = [tensor] * len(self.members) if kind in SCALARS else [
                view.tensor for view in views(tensor, self._shapes)]
            found.update({f'{parameter.name}_{kind}': part for parameter, part in zip(self.members.values(), parts)})
        return found

    def packed(self, state):
        """The inverse of `unpacked`, of {parameter's name: {kind: tensor}}; states that a member lacks are 0."""
        found, whole = dict(state), {}
        for parameter, shape, start in zip(self.members.values(), self._shapes, self._starts()):
            for kind, tensor in found.pop(parameter.name, {}).items():
                if kind in SCALARS:
                    whole.setdefault(kind, tensor)
                else:
                    target = whole.setdefault(kind, paddle.zeros_like(self.whole))
                    paddle.assign(tensor.reshape([-1]), output=target._slice(start, start + math.prod(shape)))
        return {**found, **({self.whole.name: whole} if whole else {})}

    def _starts(self):
        start = 0
        for shape in self._shapes:
            yield start
            start += _padded(shape)
