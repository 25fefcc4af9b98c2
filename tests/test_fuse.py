"""The fused form computes what the training form computes, for any norms and any precision of the weights."""
import copy

import numpy as np
import paddle
import pytest
from paddle import nn

from fuse import fuse, pack
from port_weights.load import load_weights
from port_weights.names import to_paddle_names
from port_weights.safe_load import find_weights, read_checkpoint
from replknet import RepLKNet, replknet_31b, replknet_31l, replknet_xl

TINY = {'large_kernel_sizes': [31, 29, 27, 13], 'layers': [1, 1, 2, 1], 'channels': [8, 16, 24, 32],
        'num_classes': 10}
TINY_XL = {**TINY, 'large_kernel_sizes': [27, 27, 27, 13], 'layers': [1, 1, 1, 1], 'dw_ratio': 1.5,
           'small_kernel': None, 'num_classes': 7}


def randomise_norms(model, size=128):
    """Random weights and biases for every norm, and the statistics of random images, so that no signal fades."""
    rng = np.random.default_rng(0)
    layers = [layer for layer in model.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    for layer in layers:
        layer.weight.set_value(rng.uniform(0.5, 1.5, layer.weight.shape).astype('float32'))
        layer.bias.set_value(rng.normal(0, 0.3, layer.bias.shape).astype('float32'))
        layer._momentum = 0.0  # the statistics of this one batch
    model.train()
    with paddle.no_grad():
        model(paddle.to_tensor(rng.standard_normal((4, 3, size, size), 'float32')))
    model.eval()
    return model


def norms(model):
    return [name for name, layer in model.named_sublayers() if 'BatchNorm' in type(layer).__name__]


def difference(model, twin, size):
    """Largest difference of the logits, and their largest magnitude; refuses logits that do not depend on the image."""
    assert not norms(twin) and not twin.training
    images = paddle.to_tensor(np.random.default_rng(1).standard_normal((2, 3, size, size), 'float32'))
    with paddle.no_grad():
        expected, logits = model(images).numpy(), twin(images).numpy()
    assert np.ptp(expected, axis=0).max() > 0.05
    return np.abs(logits - expected).max(), np.abs(expected).max()


@pytest.mark.parametrize('file', ['tiny', 'tiny_merged', 'tiny_xl', 'tiny_legacy'])
def test_the_fused_form_has_the_official_logits(golden, file):
    model = RepLKNet(merged='merged' in file, **(TINY_XL if 'xl' in file else TINY))
    load_weights(model, to_paddle_names(find_weights(read_checkpoint(golden / f'{file}.pth'))[0]), file)
    before = {name: t.numpy() for name, t in model.state_dict().items()}
    twin = fuse(model)
    assert not norms(twin)
    logits = twin(paddle.to_tensor(np.load(golden / 'input.npy'))).numpy()
    np.testing.assert_allclose(logits, np.load(golden / 'expected_outputs.npz')[file], atol=1e-4)
    assert model.training
    for name, tensor in model.state_dict().items():  # the original is unchanged
        np.testing.assert_array_equal(tensor.numpy(), before[name])


@pytest.mark.parametrize('options', [TINY, TINY_XL, {**TINY, 'ffn_ratio': 1.3, 'num_classes': 2}])
def test_randomised_norms(options):
    paddle.seed(0)
    model = randomise_norms(RepLKNet(**options))
    assert difference(model, fuse(model), 40)[0] < 1e-5


def test_sync_batch_norm():
    paddle.seed(0)
    model = randomise_norms(RepLKNet(**TINY))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.sublayers())
    assert difference(model, fuse(converted), 32)[0] < 1e-5


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_weights_are_folded_in_full_precision(dtype):
    paddle.seed(0)
    half = randomise_norms(RepLKNet(**TINY))
    for layer in half.sublayers():  # as O2 leaves a model on a GPU: all but the norms
        if isinstance(layer, (nn.Conv2D, nn.Linear)):
            layer.to(dtype=dtype)
    same = copy.deepcopy(half)
    same.to(dtype='float32')
    twin = fuse(half)
    assert {str(t.dtype) for t in twin.state_dict().values()} == {'paddle.float32'}
    assert difference(same, twin, 32)[0] < 1e-5


def test_feature_maps_and_their_norms():
    paddle.seed(0)
    model = randomise_norms(RepLKNet(**{**TINY, 'num_classes': None}, out_indices=(0, 2, 3),
                                     norm_intermediate_features=True))
    twin = fuse(model)
    assert not norms(twin)
    images = paddle.randn([2, 3, 48, 33])
    for expected, feature in zip(model(images), twin(images)):
        np.testing.assert_allclose(feature.numpy(), expected.numpy(), atol=1e-4)


def test_parameters_of_the_fused_form():
    model = replknet_31b()
    merged = copy.deepcopy(model)
    merged.structural_reparam()
    # a norm's scale and shift after a convolution become one bias; those before a 1x1 and the last one go altogether
    channels = sum(layer.weight.shape[0] for layer in merged.sublayers() if isinstance(layer, nn.BatchNorm2D))
    after = sum(layer.norm.weight.shape[0] for layer in merged.sublayers() if hasattr(layer, 'conv'))
    assert fuse(model).num_parameters() == merged.num_parameters() - 2 * channels + after


@pytest.mark.long
@pytest.mark.parametrize(('build', 'size'), [(replknet_31b, 224), (replknet_31l, 384), (replknet_xl, 320)])
def test_published_sizes_with_random_weights(build, size):
    paddle.seed(0)
    model = randomise_norms(build(), size)
    twin = fuse(model)
    found, scale = difference(model, twin, size)
    packed, _ = difference(model, pack(twin), size)
    print(f'{build.__name__} at {size}: logits up to {scale:.2f}, largest difference {found:.1e}, packed {packed:.1e}')
    assert max(found, packed) < 1e-4
