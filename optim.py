"""Parameter groups, optimizers and gradient clipping."""
import re

import paddle

from errors import UserError


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
        decay = weight_decay if parameter.ndim > 1 else 0.0
        scale = 1.0
        if layer_decay < 1:
            scale = layer_decay ** (MAX_LAYER_ID - layer_id(name, len(model.stages)))
        group = groups.setdefault((decay, scale), {'params': [], 'weight_decay': decay, 'learning_rate': scale})
        group['params'].append(parameter)
    return list(groups.values())


def build_optimizer(name, groups, *, betas=(0.9, 0.999), eps=1e-8):
    """Optimizer over `parameter_groups`; its learning rate is set before every step.

    Args:
        name: 'adamw', 'sgd' or 'momentum' (with betas[0]; L2 decay for the latter two).
    """
    if name == 'adamw':
        return paddle.optimizer.AdamW(learning_rate=0.0, beta1=betas[0], beta2=betas[1], epsilon=eps,
                                      parameters=groups)
    if name == 'momentum':
        return paddle.optimizer.Momentum(learning_rate=0.0, momentum=betas[0], parameters=groups)
    if name == 'sgd':
        return paddle.optimizer.SGD(learning_rate=0.0, parameters=groups)
    raise UserError(f'TRAIN.OPTIMIZER.NAME {name!r} is not known; choose from adamw, sgd, momentum')


@paddle.no_grad()
def clip_gradients(parameters, max_norm):
    """Scales the gradients so that the norm of all of them together is at most `max_norm`.

    Paddle's optimizers clip each parameter group by its own norm, and its `clip_grad_norm_` does not take the mixture
    of half and single precision that O2 has.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = sum(g.astype('float32').square().sum() for g in gradients).sqrt()
    scale = paddle.clip(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.set_value((gradient.astype('float32') * scale).astype(gradient.dtype))
