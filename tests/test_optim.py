"""Parameter groups, the arithmetic of the optimizers, and gradient clipping."""
import json
import types

import numpy as np
import paddle
import pytest

from port_weights.names import to_paddle_names
from replknet import RepLKNet, replknet_31b
from training.masters import MasterWeights
from training.optim import build_optimizer, clip_gradients, gradient_norm, layer_id, parameter_groups, set_weight_decay


def test_layer_ids_are_the_official_ones(golden):
    official = json.loads((golden / 'layer_ids_31b.json').read_text())
    names = {name: parameter for name, parameter in replknet_31b().named_parameters() if not parameter.stop_gradient}
    # each id is carried through the mapping of names as the value of a tensor
    shapes = json.loads((golden / 'official_keys_31b.json').read_text())['tensors']
    tensors = {name: np.full(shape, official.get(name, -1), 'float32') for name, shape in shapes.items()}
    ours = {name: int(array.flat[0]) for name, array in to_paddle_names(tensors).items() if name in names}
    assert ours == {name: layer_id(name) for name in names}


def test_no_weight_decay_on_norms_biases_and_other_1d_parameters():
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    model.structural_reparam()  # the depthwise convolutions have biases then
    decayed = {p.name for g in parameter_groups(model, 0.05) if g['weight_decay'] for p in g['params']}
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient:
            is_matrix = name.endswith('.weight') and 'norm' not in name and '_bn' not in name
            assert (parameter.name in decayed) == is_matrix, name


def test_every_trained_parameter_is_in_one_group():
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    grouped = [p.name for g in parameter_groups(model, 0.05, 0.7) for p in g['params']]
    assert sorted(grouped) == sorted(p.name for p in model.parameters() if not p.stop_gradient)


def adam_moments(state, gradient, t, betas):
    state['m'] = betas[0] * state.get('m', 0) + (1 - betas[0]) * gradient
    state['v'] = betas[1] * state.get('v', 0) + (1 - betas[1]) * gradient ** 2
    return state['m'] / (1 - betas[0] ** t), state['v'] / (1 - betas[1] ** t)


def adamw(w, g, lr, decay, t, betas, eps, state):
    m, v = adam_moments(state, g, t, betas)
    return w - lr * (m / (np.sqrt(v) + eps) + decay * w)


def sgd(w, g, lr, decay, t, betas, eps, state):
    return w - lr * (g + decay * w)


def momentum(w, g, lr, decay, t, betas, eps, state):
    state['velocity'] = betas[0] * state.get('velocity', 0) + g + decay * w
    return w - lr * state['velocity']


def nadam(w, g, lr, decay, t, betas, eps, state):
    """Dozat, Incorporating Nesterov Momentum into Adam, with its momentum schedule."""
    m, v = adam_moments(state, g, t, betas)
    mu, mu_next = (betas[0] * (1 - 0.5 * 0.96 ** (0.004 * s)) for s in (t, t + 1))
    state['product'] = state.get('product', 1) * mu
    ahead = mu_next * state['m'] / (1 - state['product'] * mu_next) + (1 - mu) * g / (1 - state['product'])
    return w - lr * (ahead / (np.sqrt(v) + eps) + decay * w)


def lion(w, g, lr, decay, t, betas, eps, state):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, algorithm 2."""
    m = state.get('m', 0)
    state['m'] = betas[1] * m + (1 - betas[1]) * g
    return w - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + decay * w)


def adan(w, g, lr, decay, t, betas, eps, state):
    """Xie et al., Adan, algorithm 1, whose betas are one minus these; with bias correction of the averages."""
    b1, b2, b3 = 1 - np.array(betas)
    difference = g - state.get('g', g)
    state['g'] = g
    state['m'] = (1 - b1) * state.get('m', 0) + b1 * g
    state['v'] = (1 - b2) * state.get('v', 0) + b2 * difference
    state['n'] = (1 - b3) * state.get('n', 0) + b3 * (g + (1 - b2) * difference) ** 2
    m, v, n = (state[key] / (1 - (1 - b) ** t) for key, b in (('m', b1), ('v', b2), ('n', b3)))
    return (w - lr / (np.sqrt(n) + eps) * (m + (1 - b2) * v)) / (1 + lr * decay)


def lamb(w, g, lr, decay, t, betas, eps, state):
    """You et al., Large Batch Optimization for Deep Learning, algorithm 2; no trust ratio without weight decay."""
    m, v = adam_moments(state, g, t, betas)
    update = m / (np.sqrt(v) + eps) + decay * w
    return w - lr * update * (np.linalg.norm(w) / np.linalg.norm(update) if w.ndim > 1 else 1)


OPTIMIZERS = [adamw, sgd, momentum, nadam, lion, adan, lamb]


@pytest.mark.parametrize('rule', OPTIMIZERS)
def test_optimizers_follow_their_published_rule(rule):
    """Thirty steps against float64: changing rates and decays, layer-wise scales, no decay on 1-D parameters."""
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    betas = (0.9, 0.8, 0.95) if rule is adan else (0.9, 0.95)
    optimizer = build_optimizer(rule.__name__, parameter_groups(model, 0.1, 0.7), betas=betas, eps=1e-3)
    rng = np.random.default_rng(0)
    trained = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    expected = {n: p.numpy().astype('float64') for n, p in trained}
    states = {n: {} for n, _ in trained}
    for t in range(1, 31):
        rate, decay = 0.02 / t, 0.1 if t < 10 else 0.1 + t / 100
        if t >= 10:
            set_weight_decay(optimizer, decay)
        optimizer.set_lr(rate)
        for name, parameter in trained:
            gradient = rng.standard_normal(parameter.shape).astype('float32')
            parameter.grad = paddle.to_tensor(gradient)
            expected[name] = rule(expected[name], gradient.astype('float64'), rate * 0.7 ** (13 - layer_id(name)),
                                  decay if parameter.ndim > 1 else 0, t, betas, 1e-3, states[name])
        optimizer.step()
        optimizer.clear_grad()
    for name, parameter in trained:
        np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', [rule.__name__ for rule in OPTIMIZERS])
def test_half_precision_weights_are_the_rounded_weights_of_a_single_precision_run(name, dtype):
    paddle.seed(0)
    single, half = paddle.nn.Linear(16, 8), paddle.nn.Linear(16, 8)
    half.set_state_dict(single.state_dict())
    masters = MasterWeights(half, lambda model: model.to(dtype=dtype))
    betas = (0.98, 0.92, 0.99) if name == 'adan' else (0.9, 0.99)
    optimizers = [build_optimizer(name, parameter_groups(single, 0.1), betas=betas),
                  build_optimizer(name, parameter_groups(half, 0.1, masters=masters.by_name), betas=betas)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        for a, b in zip(single.parameters(), half.parameters()):
            b.grad = paddle.to_tensor(rng.standard_normal(a.shape).astype('float32')).astype(dtype)
            a.grad = b.grad.astype('float32')
        masters.take_gradients()
        for optimizer in optimizers:
            optimizer.set_lr(1e-3)
            optimizer.step()
            optimizer.clear_grad()
        masters.update_model()
        masters.clear_gradients()
    for (key, a), b in zip(single.named_parameters(), half.parameters()):
        assert str(b.dtype).endswith(dtype)
        np.testing.assert_array_equal(masters.by_name[key].numpy(), a.numpy())
        np.testing.assert_array_equal(b.astype('float32').numpy(), a.astype(dtype).astype('float32').numpy())


def gradients_of_norm_5():
    """Of two parameters of three."""
    return [types.SimpleNamespace(grad=gradient) for gradient in (paddle.full([1], -3.0), paddle.full([1], 4.0), None)]


@pytest.mark.parametrize(('limit', 'mode', 'first', 'second'), [
    (0.5, 'norm', -0.3, 0.4), (100.0, 'norm', -3.0, 4.0), (3.5, 'value', -3.0, 3.5), (1.0, 'value', -1.0, 1.0)])
def test_clipping_by_norm_and_by_value(limit, mode, first, second):
    parameters = gradients_of_norm_5()
    norm = gradient_norm(parameters)
    clip_gradients(parameters, limit, mode, norm)
    assert float(norm) == pytest.approx(5)
    np.testing.assert_allclose([parameters[0].grad.item(), parameters[1].grad.item()], [first, second], rtol=1e-5)
