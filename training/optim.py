"""Parameter groups, optimizers, and gradients: their norm, clipping, and which of them are not finite."""
import re

import paddle

from errors import UserError
from training.flat import FlatParameters
from training.optimizers import Adan, Lamb, Lion, NAdam

MAX_LAYER_ID = 13


def layer_id(name, num_stages=4):
    """Depth of a parameter for layer-wise learning-rate decay, as in the fine-tuning recipe of the official code.

    Stem: 0; stage 0 and transition 0: 1; stage 1 and transition 1: 2; stage 2: 3 + block // 4, at most 11;
    transition 2: 11; stage 3: 12; final norm and head: 13.

    Args:
        name: of the parameter, such as 'stages.2.blocks.5.pw_conv_1.conv.weight'.
        num_stages: of the model.
    Raises:
        UserError: the model does not have 4 stages.
    """
    if num_stages != 4:
        raise UserError(f'TRAIN.LAYER_DECAY is defined for 4 stages; this model has {num_stages}: set it to 1.0')
    stage = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name)
    if name.startswith('stem.'):
        return 0
    if stage:
        index, block = int(stage.group(1)), int(stage.group(2))
        return {0: 1, 1: 2, 2: min(3 + block // 4, 11), 3: 12}[index]
    if name.startswith('transitions.'):
        return {0: 1, 1: 2, 2: 11}[int(name.split('.')[1])]
    return MAX_LAYER_ID


def parameter_groups(model, weight_decay, layer_decay=1.0, masters=None):
    """Groups of trained parameters for a Paddle optimizer.

    Biases, norms and other 1-D parameters get no weight decay. With `layer_decay` below 1, the learning rate of a
    parameter is scaled by layer_decay ** (13 - layer_id). `masters`, {name: float32 parameter}, are updated in place of
    the parameters of these names.

    Returns:
        list of {'params', 'weight_decay', 'learning_rate', 'decays'}; 'learning_rate' is the scale, as Paddle expects.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.stop_gradient:  # for Paddle, running statistics are parameters as well
            continue
        decays = parameter.ndim > 1
        scale = 1.0
        if layer_decay < 1:
            scale = layer_decay ** (MAX_LAYER_ID - layer_id(name, len(model.stages)))
        group = groups.setdefault((decays, scale), {'params': [], 'weight_decay': weight_decay if decays else 0.0,
                                                    'learning_rate': scale, 'decays': decays})
        group['params'].append((masters or {}).get(name, parameter))
    return list(groups.values())


def updates_single_parameters(name, device):
    """Whether the optimizer `name` is to update each parameter on its own, not as part of a long one.

    LAMB scales the step of each parameter by its norm. NAdam and Adan take square roots, which on a CPU are rounded
    differently in the last elements of a tensor (those that do not fill a vector register), so that runs would not
    continue bit for bit as before; a GPU computes all elements alike.
    """
    return name == 'lamb' or name in ('nadam', 'adan') and device == 'cpu'


def flatten(name, groups, model, masters=None, device='cpu'):
    """Makes the parameters of each group of `parameter_groups` views of a long one.

    Args:
        name: of the optimizer; see `updates_single_parameters`.
        groups, masters: see `parameter_groups`.
        device: kind of device in use ('gpu', 'cpu', ...).
    Returns:
        list of FlatParameters, and the groups for `build_optimizer`.
    """
    names = {id((masters or {}).get(name, parameter)): name for name, parameter in model.named_parameters()}
    flat = [FlatParameters({names[id(parameter)]: parameter for parameter in group['params']}) for group in groups]
    if updates_single_parameters(name, device):
        return flat, groups
    return flat, [{**group, 'params': [one.whole]} for one, group in zip(flat, groups)]


def build_optimizer(name, groups, *, betas=(0.9, 0.999), eps=1e-8):
    """An optimizer over the groups of `parameter_groups`, with a learning rate of 0 until `set_lr` is called.

    Args:
        name: 'adamw', 'nadam', 'lion', 'adan' or 'lamb' (weight decay acts on the weights), or 'sgd' or 'momentum'
            (weight decay is added to the gradients).
        groups: see `parameter_groups`.
        betas: three numbers for 'adan', otherwise two; 'momentum' uses only the first, 'sgd' none.
        eps: constant added to denominators; unused by 'lion', 'sgd' and 'momentum'.
    """
    optimizer = paddle.optimizer
    common = {'learning_rate': 0.0, 'parameters': groups}
    if name == 'adamw':
        return optimizer.AdamW(beta1=betas[0], beta2=betas[1], epsilon=eps, **common)
    if name == 'lamb':
        return Lamb(beta1=betas[0], beta2=betas[1], epsilon=eps, **common)
    if name == 'momentum':
        return optimizer.Momentum(momentum=betas[0], **common)
    if name == 'sgd':
        return optimizer.SGD(**common)
    return {'nadam': NAdam, 'lion': Lion, 'adan': Adan}[name](groups, betas, eps)


def set_weight_decay(optimizer, weight_decay):
    """Sets the weight decay of an optimizer's parameters, except the 1-D ones, which have none."""
    for group in optimizer._param_groups:
        if not group['decays']:
            continue
        if isinstance(optimizer, (paddle.optimizer.SGD, paddle.optimizer.Momentum)):
            for parameter in group['params']:
                parameter.regularizer = paddle.regularizer.L2Decay(weight_decay)
        else:
            group['weight_decay'] = weight_decay


@paddle.no_grad()
def gradient_norm(parameters):
    """L2 norm over the gradients of all parameters, as a float32 scalar tensor."""
    return sum(p.grad.square().sum() for p in parameters if p.grad is not None).sqrt()


@paddle.no_grad()
def clip_gradients(parameters, limit, mode, norm=None):
    """Clips the gradients in place.

    Paddle's optimizers would clip each parameter group by its own norm.

    Args:
        limit: largest norm over all gradients (mode 'norm'), or largest absolute value of an element (mode 'value').
        mode: 'norm' or 'value'.
        norm: result of `gradient_norm`, for mode 'norm'.
    """
    if mode == 'norm':
        scale = paddle.clip(limit / (norm + 1e-6), max=1.0)
        change_gradients(parameters, lambda gradient: gradient.multiply_(scale))
    else:
        change_gradients(parameters, lambda gradient: gradient.clip_(-limit, limit))


@paddle.no_grad()
def change_gradients(parameters, change):
    """Calls `change` on every gradient, to modify it in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            change(parameter.grad)


def nonfinite_gradients(model, masters):
    """Describes, for an error message, in which parts of a model gradients are not finite.

    `masters` is as for `parameter_groups`; the gradients are theirs.
    """
    gradients = ((name, masters.get(name, parameter).grad) for name, parameter in model.named_parameters())
    parts, trained = {}, [(name, gradient) for name, gradient in gradients if gradient is not None]
    for name, gradient in trained:
        if not bool(paddle.isfinite(gradient).all()):
            part = '.'.join(name.split('.')[:2 if name.startswith(('stages', 'transitions')) else 1])
            parts.setdefault(part, []).append(name)
    broken = sum(map(len, parts.values()))
    if broken in (0, len(trained)):
        return 'no gradient is finite' if broken else 'all gradients are finite'
    return 'gradients not finite in ' + ', '.join(
        f'{part} ({names[0][len(part) + 1:]}{f" and {len(names) - 1} more" if len(names) > 1 else ""})'
        for part, names in parts.items())
