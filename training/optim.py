"""Parameter groups, optimizers and gradient clipping."""
import re

import paddle

from errors import UserError
from training.optimizers import Adan, Lamb, Lion, NAdam


def layer_id(name, num_stages=4):
    """Group of a parameter for layer-wise learning-rate decay (fine-tuning recipe of the official code).

    Stem 0; stage 0 and transition 0: 1; stage 1 and transition 1: 2; stage 2: 3 + block // 4, up to 11;
    transition 2: 11; stage 3: 12; final norm and head: 13.
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


MAX_LAYER_ID = 13


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """Groups of trained parameters for a Paddle optimizer.

    Biases, norms and other 1-D parameters get no weight decay. With `layer_decay` below 1 a parameter's learning
    rate is scaled by layer_decay ** (13 - layer_id).
    Returns:
        list of {'params', 'weight_decay', 'learning_rate'}; 'learning_rate' is the scale, as Paddle takes it.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.stop_gradient:  # running statistics are parameters to Paddle
            continue
        decays = parameter.ndim > 1
        scale = 1.0
        if layer_decay < 1:
            scale = layer_decay ** (MAX_LAYER_ID - layer_id(name, len(model.stages)))
        group = groups.setdefault((decays, scale), {'params': [], 'weight_decay': weight_decay if decays else 0.0,
                                                    'learning_rate': scale})
        group['params'].append(parameter)
    return list(groups.values())


def build_optimizer(name, groups, *, betas=(0.9, 0.999), eps=1e-8):
    """Optimizer over `parameter_groups`; its learning rate is set before every step.

    Args:
        name: 'adamw', 'nadam', 'lion', 'adan' or 'lamb' (decay acts on the weights), or 'sgd' or 'momentum' (decay is
            added to the gradients).
        betas: three for 'adan', else two, of which 'momentum' uses the first.
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
    """Sets the weight decay of an optimizer's groups, but for that of 1-D parameters, which have none."""
    for group in optimizer._param_groups:
        if group['params'][0].ndim == 1:
            continue
        if isinstance(optimizer, (paddle.optimizer.SGD, paddle.optimizer.Momentum)):
            for parameter in group['params']:
                parameter.regularizer = paddle.regularizer.L2Decay(weight_decay)
        else:
            group['weight_decay'] = weight_decay


@paddle.no_grad()
def gradient_norm(parameters):
    """Norm of the gradients of all parameters together; float32 scalar tensor."""
    return sum(p.grad.astype('float32').square().sum() for p in parameters if p.grad is not None).sqrt()


@paddle.no_grad()
def clip_gradients(parameters, limit, mode='norm'):
    """Clips the gradients in place.

    Paddle's optimizers clip each parameter group by its own norm, and its `clip_grad_norm_` does not take the mixture
    of half and single precision that O2 has.
    Args:
        limit: of the norm of all gradients together (mode 'norm'), or of each element's size (mode 'value').
    Returns:
        the norm before clipping, as `gradient_norm`.
    """
    norm = gradient_norm(parameters)
    if mode == 'norm':
        scale = paddle.clip(limit / (norm + 1e-6), max=1.0)
        change_gradients(parameters, lambda gradient: gradient.multiply_(scale))
    else:
        change_gradients(parameters, lambda gradient: gradient.clip_(-limit, limit))
    return norm


@paddle.no_grad()
def change_gradients(parameters, change):
    """Applies `change`, which works in place and in float32, to every gradient."""
    for gradient in (p.grad for p in parameters if p.grad is not None):
        single = gradient if gradient.dtype == paddle.float32 else gradient.astype('float32')
        change(single)
        if single is not gradient:
            paddle.assign(single.astype(gradient.dtype), output=gradient)
