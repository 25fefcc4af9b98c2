"""Loads weights into a model: all of them, or none and an error."""
import numpy as np
import paddle

from errors import UserError


def not_finite(arrays):
    """Names of up to four of the {name: array} that contain NaN or infinity, as text; '' if there are none."""
    names = [name for name, array in arrays.items()
             if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()]
    return ', '.join(names[:4] + ['...'] * bool(names[4:]))


def load_weights(model, weights, origin, drop_head=False):
    """Copies `weights` into `model`. Unless all of them fit, the model is not changed.

    Args:
        model: Paddle layer.
        weights: {name: array}, with the names of the model's state dict.
        origin: where the weights come from, for messages.
        drop_head: keep the initial values of a head with another class count, or of one that `weights` do not have.
    Returns:
        names of the tensors that keep their initial values for this reason.
    Raises:
        UserError: tensors are missing, surplus, of another shape or not finite; the message lists them.
    """
    own = model.state_dict()
    dropped = []
    if drop_head:
        head = [name for name in ('head.weight', 'head.bias') if name in own]
        if not any(name in weights for name in head):
            dropped = head
        else:
            dropped = [n for n in head if n in weights and tuple(weights[n].shape) != tuple(own[n].shape)]
    missing = [name for name in own if name not in weights and name not in dropped]
    surplus = [name for name in weights if name not in own]
    mismatched = [f'{name} {list(weights[name].shape)} for {list(own[name].shape)}' for name in own
                  if name in weights and name not in dropped and tuple(weights[name].shape) != tuple(own[name].shape)]
    problems = [f'{len(names)} {kind}: {", ".join(names[:8])}{", ..." if len(names) > 8 else ""}'
                for kind, names in (('missing', missing), ('surplus', surplus), ('of another shape', mismatched))
                if names]
    if problems:
        raise UserError(f'{origin}: the weights do not fit the model: {"; ".join(problems)}')
    broken = not_finite({name: weights[name] for name in own if name not in dropped})
    if broken:
        raise UserError(f'{origin}: contains values that are not finite (NaN or infinity): {broken}; use another '
                        'checkpoint, from before the training diverged')
    for name, tensor in own.items():
        if name not in dropped:
            tensor.set_value(paddle.to_tensor(np.ascontiguousarray(weights[name])).astype(tensor.dtype))
    return dropped
