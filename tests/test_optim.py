"""Parameter groups, the optimizers' arithmetic and gradient clipping."""
import json
import types

import numpy as np
import paddle
import pytest

from optim import build_optimizer, clip_gradients, layer_id, parameter_groups
from port_weights.names import to_paddle_names
from replknet import RepLKNet, replknet_31b


def test_layer_ids_are_the_official_ones(golden):
    official = json.loads((golden / 'layer_ids_31b.json').read_text())
    names = {name: parameter for name, parameter in replknet_31b().named_parameters() if not parameter.stop_gradient}
    # translate official names by carrying each id through the name mapping as a tensor
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


def test_adamw_with_groups_is_the_published_arithmetic():
    """Two steps against numpy: decoupled decay scaled by the rate, layer-wise scale, no decay on 1-D parameters."""
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    optimizer = build_optimizer('adamw', parameter_groups(model, 0.1, 0.7), betas=(0.9, 0.99), eps=1e-8)
    rng = np.random.default_rng(0)
    trained = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    values = {n: p.numpy().astype('float64') for n, p in trained}
    moments = {n: [0.0, 0.0] for n, _ in trained}
    for step, rate in enumerate((0.01, 0.02), 1):
        optimizer.set_lr(rate)
        for name, parameter in trained:
            gradient = rng.standard_normal(parameter.shape).astype('float32')
            parameter.grad = paddle.to_tensor(gradient)
            lr = rate * 0.7 ** (13 - layer_id(name))
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.astype('float64') ** 2
            moments[name] = [first, second]
            if parameter.ndim > 1:
                values[name] = values[name] * (1 - lr * 0.1)
            values[name] = values[name] - lr * (first / (1 - 0.9 ** step)) / (
                np.sqrt(second / (1 - 0.99 ** step)) + 1e-8)
        optimizer.step()
        optimizer.clear_grad()
    for name, parameter in trained:
        np.testing.assert_allclose(parameter.numpy(), values[name], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('name', ['sgd', 'momentum'])
def test_other_optimizers_descend(name):
    model = paddle.nn.Linear(3, 1)
    optimizer = build_optimizer(name, parameter_groups(model, 0.0))
    optimizer.set_lr(0.1)
    before = model.weight.numpy()
    model(paddle.ones([1, 3])).sum().backward()
    optimizer.step()
    np.testing.assert_allclose(model.weight.numpy(), before - 0.1, rtol=1e-6)


def test_clipping_takes_the_norm_of_half_and_single_precision_together():
    single, half = paddle.full([4], 3.0), paddle.full([4], 4.0).astype('bfloat16')
    parameters = [types.SimpleNamespace(grad=gradient) for gradient in (single, half, None)]
    clip_gradients(parameters, 1.0)  # the norm is 10
    np.testing.assert_allclose(single.numpy(), 0.3, rtol=1e-5)
    np.testing.assert_allclose(half.astype('float32').numpy(), 0.4, rtol=1e-2)
    assert half.dtype == paddle.bfloat16
    clip_gradients(parameters, 100.0)
    np.testing.assert_allclose(single.numpy(), 0.3, rtol=1e-5)
