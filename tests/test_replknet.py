"""The model against the reference data of the official code, and the effects of its options."""
import itertools
import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from config import get_config
from drop_path import DropPath, draw_masks
from port_weights.load import load_weights
from port_weights.names import to_paddle_names
from port_weights.safe_load import find_weights, read_checkpoint
from replknet import RepLKNet, build_replknet, replknet_13b, replknet_31b, replknet_31l, replknet_xl
from run_folder.checkpoint import model_arrays

TINY = {'large_kernel_sizes': [31, 29, 27, 13], 'layers': [1, 1, 2, 1], 'channels': [8, 16, 24, 32],
        'num_classes': 10}
TINY_XL = {**TINY, 'large_kernel_sizes': [27, 27, 27, 13], 'layers': [1, 1, 1, 1], 'dw_ratio': 1.5,
           'small_kernel': None, 'num_classes': 7}


def load(golden, file, key='auto', **kwargs):
    weights = to_paddle_names(find_weights(read_checkpoint(golden / file), key)[0])
    model = RepLKNet(merged='merged' in file, **{**(TINY_XL if 'xl' in file else TINY), **kwargs})
    load_weights(model, weights, file)
    model.eval()
    return model


@pytest.fixture
def images(golden):
    return paddle.to_tensor(np.load(golden / 'input.npy'))


@pytest.fixture
def expected(golden):
    return np.load(golden / 'expected_outputs.npz')


def small(**kwargs):
    """A model whose running statistics and norms are not the initial ones."""
    paddle.seed(0)
    model = RepLKNet(**{'large_kernel_sizes': [9, 7, 5, 5], 'layers': [1, 1, 2, 1], 'channels': [4, 6, 8, 10],
                        'num_classes': 3, **kwargs})
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        if '.norm.' in name or '_bn.' in name or name.startswith('norm.'):
            tensor.set_value(paddle.to_tensor(rng.uniform(0.5, 1.5, tensor.shape).astype('float32')))
    return model


@pytest.mark.parametrize('file', ['tiny.pth', 'tiny_merged.pth', 'tiny_xl.pth', 'tiny_legacy.pth'])
def test_logits_are_those_of_the_official_code(golden, images, expected, file):
    logits = load(golden, file)(images).numpy()
    np.testing.assert_allclose(logits, expected[file.replace('.pth', '')], atol=1e-4)


def test_merged_model_has_the_official_logits(golden, images, expected):
    model = load(golden, 'tiny.pth')
    model.structural_reparam()
    np.testing.assert_allclose(model(images).numpy(), expected['tiny'], atol=1e-4)
    merged = load(golden, 'tiny_merged.pth')
    for name, array in model_arrays(merged).items():
        np.testing.assert_allclose(model.state_dict()[name].numpy(), array, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('indices', [s for n in range(1, 5) for s in itertools.combinations(range(4), n)])
def test_feature_maps_of_any_subset_of_stages(golden, images, expected, indices):
    model = load(golden, 'tiny.pth', out_indices=indices)
    features = model(images)
    assert len(features) == len(indices)
    for stage, feature in zip(indices, features):
        np.testing.assert_allclose(feature.numpy(), expected[f'tiny_stage{stage}'], atol=1e-4)


def test_a_backbone_has_no_head_and_gives_the_last_map(golden, images, expected):
    model = RepLKNet(**{**TINY, 'num_classes': None})
    weights = to_paddle_names(find_weights(read_checkpoint(golden / 'tiny.pth'))[0])
    load_weights(model, {k: v for k, v in weights.items() if not k.startswith(('head.', 'norm.'))}, 'tiny')
    model.eval()
    np.testing.assert_allclose(model(images).numpy(), expected['tiny_stage3'], atol=1e-4)


def test_intermediate_norms_belong_to_the_returned_stages(images):
    model = RepLKNet(**{**TINY_XL, 'num_classes': None}, out_indices=(1, 3), norm_intermediate_features=True)
    assert [name for name, _ in model.named_sublayers() if name.startswith('stages.') and name.count('.') == 2
            and name.endswith('.norm')] == ['stages.1.norm', 'stages.3.norm']
    model.eval()
    model.stages[1].norm.bias.set_value(paddle.full([16], 5.0))
    with_norm = model(images)[0]
    plain = model.forward_features(images)[1]
    np.testing.assert_allclose(with_norm.numpy(), plain.numpy() / np.sqrt(1 + 1e-5) + 5, atol=1e-5)


@pytest.mark.parametrize('indices', [(4,), (-1,), (1, 1)])
def test_out_indices_that_are_not_a_subset_are_refused(indices):
    with pytest.raises(ValueError, match='out_indices'):
        RepLKNet(**TINY, out_indices=indices)


@pytest.mark.parametrize(('build', 'count'), [(replknet_31b, 79_864_168), (replknet_31l, 172_671_016),
                                              (replknet_xl, 335_435_752)])
def test_parameter_counts_and_names_of_the_published_variants(golden, build, count):
    model = build()
    assert model.num_parameters() == count
    size = {replknet_31b: '31b', replknet_31l: '31l', replknet_xl: 'xl'}[build]
    official = json.loads((golden / f'official_keys_{size}.json').read_text())['tensors']
    shapes = {name: np.broadcast_to(np.float32(0), shape) for name, shape in official.items()}
    ours = to_paddle_names(shapes)
    assert {name: list(t.shape) for name, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_merged_parameter_count():
    model = replknet_31b()
    model.structural_reparam()
    assert model.num_parameters() == 79_527_272
    assert model.num_parameters() == replknet_31b(merged=True).num_parameters()


def test_the_ablation_has_13x13_kernels():
    model = build_replknet(get_config(Path(__file__).parents[1] / 'configs/replknet_13b.yaml'))
    sizes = {tensor.shape[-1] for name, tensor in model.state_dict().items()
             if name.endswith('large_kernel_origin.conv.weight')}
    assert sizes == {13}
    assert {name: p.shape for name, p in model.state_dict().items()} == {
        name: p.shape for name, p in replknet_13b().state_dict().items()}


def test_default_settings_build_31b():
    assert build_replknet(get_config()).num_parameters() == 79_864_168


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 40), (97, 32)])
@pytest.mark.parametrize('merge', [False, True])
def test_any_size_from_32_up(size, merge):
    model = small()
    model.eval()
    if merge:
        model.structural_reparam()
    assert model(paddle.randn([1, 3, *size])).shape == [1, 3]


@pytest.mark.parametrize('shape', [[1, 3, 31, 32], [1, 3, 32, 16], [1, 4, 32, 32], [3, 32, 32]])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r'takes \[N, 3, H, W\]'):
        small()(paddle.zeros(shape))


def test_merging_keeps_the_function_and_is_idempotent():
    model = small(dw_ratio=1.5)
    model.eval()
    images = paddle.randn([2, 3, 48, 40])
    before = model(images).numpy()
    model.structural_reparam()
    model.structural_reparam()
    np.testing.assert_allclose(model(images).numpy(), before, atol=1e-5)
    names = list(model.state_dict())
    assert 'stages.0.blocks.0.large_kernel.large_kernel_reparam.bias' in names
    assert not any('large_kernel_origin' in name or 'small_kernel_conv' in name for name in names)


def test_merging_works_after_conversion_to_sync_batch_norm():
    model = small()
    model.eval()
    expected = {k: v.numpy() for k, v in model.state_dict().items()}
    converted = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    converted.structural_reparam()
    plain = small()
    load_weights(plain, expected, 'the same weights')
    plain.structural_reparam()
    for name, tensor in plain.state_dict().items():
        np.testing.assert_array_equal(converted.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_small_kernel_larger_than_large_is_refused():
    with pytest.raises(ValueError, match='small_kernel 7 is larger'):
        small(small_kernel=7)


def test_number_of_stages_must_agree():
    with pytest.raises(ValueError, match='one value per stage'):
        RepLKNet(large_kernel_sizes=[31, 29], layers=[1, 1, 1], channels=[8, 16, 32])


def test_drop_path_rates_rise_linearly_and_a_pair_shares_one():
    model = RepLKNet(**TINY, drop_path=0.4)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.repeat([0, 0.1, 0.2, 0.3, 0.4], 2), atol=1e-12)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    paddle.seed(1)
    x = paddle.ones([4000, 2, 1, 1])
    y = DropPath(0.25)(x).numpy().reshape(4000, 2)
    assert set(np.unique(y).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert (y[:, 0] == y[:, 1]).all()
    assert abs(y.mean() - 1) < 0.03


def test_initial_weights_have_the_official_distribution():
    paddle.seed(0)
    model = small(channels=[64, 64, 64, 64])
    for name, fan_in in (('stem.2.conv.weight', 64), ('stem.1.conv.weight', 9), ('head.weight', 64),
                         ('stages.0.blocks.0.large_kernel.large_kernel_origin.conv.weight', 81)):
        values = model.state_dict()[name].numpy()
        assert np.abs(values).max() <= fan_in ** -0.5
        assert np.abs(values).max() > 0.95 * fan_in ** -0.5
    assert np.abs(model.head.bias.numpy()).max() > 0  # the official code leaves PyTorch's uniform bias


def test_masks_drawn_together_are_those_of_single_layers():
    layers = [DropPath(rate) for rate in (0.0, 0.1, 0.3, 0.3, 0.5, 0.7)]
    layers[2].eval()
    paddle.seed(5)
    masks = draw_masks(layers, 7)
    after = paddle.rand([2]).numpy()
    paddle.seed(5)
    ones = paddle.ones([7, 1, 1, 1])
    for layer, mask in zip(layers, masks):
        assert (mask is None) == (layer.rate == 0 or not layer.training)
        alone = layer(ones).numpy()
        assert layer(ones, mask).numpy().tobytes() == alone.tobytes() and (mask is None or 0 <= alone.min() < 1)
    np.testing.assert_array_equal(paddle.rand([2]).numpy(), after)
    assert draw_masks(layers[:1], 7) == [None]


def test_a_stage_in_training_is_the_sequence_of_its_blocks():
    stage, x = small(drop_path=0.8).stages[2], paddle.randn([4, 8, 8, 8])
    paddle.seed(3)
    found = stage(x).numpy()
    paddle.seed(3)
    for block in stage.blocks:
        x = block(x)
    assert found.tobytes() == x.numpy().tobytes()


@pytest.mark.parametrize('drop_path', [0.0, 0.5])
def test_recomputation_changes_neither_gradients_nor_statistics(drop_path):
    results = []
    images = paddle.to_tensor(np.random.default_rng(0).standard_normal((4, 3, 32, 48), 'float32'))
    for recompute in (False, True):
        model = small(recompute=recompute, drop_path=drop_path)
        paddle.seed(3)
        (model(images) ** 2).sum().backward()
        results.append(({name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient},
                        model_arrays(model), paddle.rand([1]).item()))
    (gradients, state, draw), (other_gradients, other_state, other_draw) = results
    for name in gradients:
        np.testing.assert_allclose(other_gradients[name], gradients[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name in state:
        np.testing.assert_array_equal(other_state[name], state[name], err_msg=name)
    assert draw == other_draw


RECOMPUTED = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np, paddle
from large_kernel import autotune
from replknet import RepLKNet
results = []
for recompute in (True, False):
    paddle.seed(0)
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3, drop_path=0.3, recompute=recompute)
    model.train()
    paddle.seed(5)
    (model(paddle.ones([2, 3, 32, 32])) ** 2).sum().backward()
    results.append([(p.grad if p.grad is not None else p).numpy() for p in model.parameters()])
assert any(key[-1] for key in autotune._choices)
print(all(a.tobytes() == b.tobytes() for a, b in zip(*results)))
"""


def test_convolutions_are_measured_before_a_block_is_recomputed(run_script, tmp_path):
    """Without the operators, the convolutions of a new shape are measured, which needs gradients of its own."""
    (tmp_path / 'recomputed.py').write_text(RECOMPUTED)
    done = run_script(tmp_path / 'recomputed.py', Path(__file__).parents[1], CXX='/no/compiler')
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == 'True', done.stderr
