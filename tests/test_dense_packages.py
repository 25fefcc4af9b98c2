"""The configurations in configs/dense, and one training step of each with PaddleSeg and PaddleDetection themselves.

The steps run with --long, where the packages are installed: `pip install --no-deps paddleseg==2.8.0 paddledet==2.6.0`,
and what they import.
"""
import inspect
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml

import dense
from replknet import NORMS, VARIANTS
from zoo import ZOO

FOLDER = Path(__file__).parents[1] / 'configs' / 'dense'
SEGMENTATION, DETECTION = (sorted((FOLDER / name).glob('*.yml')) for name in ('paddleseg', 'paddledetection'))
TINY = {'layers': [1, 1, 1, 1], 'channels': [8, 12, 16, 20], 'large_kernel_sizes': [9, 7, 5, 5]}


def merged(path):
    """A configuration with those it is based on; both packages merge dicts and replace lists."""
    def merge(old, new):
        return {**old, **{key: merge(old[key], value) if isinstance(value, dict) and key in old else value
                          for key, value in new.items()}}

    own = yaml.safe_load(path.read_text())
    bases = own.pop('_base_', None) or own.pop('_BASE_', None)
    for base in [bases] if isinstance(bases, str) else bases or []:
        own = merge(merged(path.parent / base), own)
    return own


def backbone_of(path):
    config = merged(path)
    settings = dict(config['model']['backbone'] if 'model' in config else config['RepLKNetDet'])
    settings.pop('type', None)
    return settings


@pytest.mark.parametrize('path', [*SEGMENTATION, *DETECTION], ids=lambda path: path.stem)
def test_each_file_names_a_published_backbone_and_says_that_it_is_not_trained(path):
    assert path.read_text().startswith('# Not trained here.')
    settings = backbone_of(path)
    assert set(settings) <= set(inspect.signature(dense.RepLKNetSeg.__init__).parameters)
    assert settings['variant'] in VARIANTS
    assert ZOO[settings['pretrained']].variant == settings['variant']
    assert settings.get('norm_inter_features', False) == (settings['variant'] == 'replknet_xl')
    assert '0.5, 0.5, 0.5' in path.read_text() or settings['variant'] != 'replknet_xl'  # mean of the pretraining


def test_the_schedules_are_the_official_ones():
    segmentation = {path.stem: merged(path) for path in SEGMENTATION}
    assert {name: (c['batch_size'], c['iters'], c['lr_scheduler']['warmup_iters'], c['model']['backbone']['drop_path'])
            for name, c in segmentation.items()} == {
        'upernet_replknet_31b_1k_ade20k_512': (2, 40000, 400, 0.5),
        'upernet_replknet_31b_1k_cityscapes_769': (2, 20000, 400, 0.5),
        'upernet_replknet_31b_22k_ade20k_640': (2, 40000, 400, 0.3),
        'upernet_replknet_31l_22k_ade20k_640': (1, 80000, 800, 0.3),
        'upernet_replknet_xl_73m_ade20k_640': (2, 160000, 1500, 0.5)}
    assert {c['lr_scheduler']['learning_rate'] for c in segmentation.values()} == {2e-4}
    detection = {path.stem: merged(path) for path in DETECTION}
    assert {name.split('replknet_')[1]: c['RepLKNetDet']['drop_path'] for name, c in detection.items()} == {
        '31b_1k_3x_coco': 0.6, '31b_22k_3x_coco': 0.4, '31l_22k_3x_coco': 0.7, 'xl_73m_3x_coco': 0.5}
    assert {(c['epoch'], c['LearningRate']['base_lr']) for c in detection.values()} == {(36, 4e-4)}
    for config in detection.values():
        assert config['RPNHead']['loss_rpn_bbox'] == 'SmoothL1Loss'
        assert config['SmoothL1Loss'] == {'beta': pytest.approx(1 / 9), 'loss_weight': 1.0}


@pytest.fixture(scope='module')
def registered():
    return dense.register()  # PaddleDetection refuses a second time


def changed(before, model):
    """Names of the parameters that a step has changed."""
    return {name for name, p in model.named_parameters() if not np.array_equal(before[name], p.numpy())}


def values(model):
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.long
@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_paddleseg_takes_a_training_step(path, registered, monkeypatch):
    cvlibs = pytest.importorskip('paddleseg.cvlibs')
    from paddleseg.core.train import loss_computation
    from paddleseg.cvlibs.builder import SegBuilder
    assert 'paddleseg' in registered
    config = cvlibs.Config(str(path))
    config.dic['model']['backbone'].update(pretrained=None, variant_args=TINY)
    config.dic['model']['channels'] = 16
    config.dic['lr_scheduler'].update(warmup_iters=1, warmup_start_lr=1e-4)
    builder = SegBuilder(config)
    paddle.seed(0)
    model, optimizer = builder.model, builder.optimizer
    rng, before = np.random.default_rng(0), values(model)
    images = paddle.to_tensor(rng.standard_normal((2, 3, 96, 96)).astype('float32'))
    labels = paddle.to_tensor(rng.integers(0, config.dic['model']['num_classes'], (2, 96, 96)))
    ones_like = paddle.ones_like  # of labels; Paddle 3 does not multiply these integers with a float mask
    monkeypatch.setattr(paddle, 'ones_like', lambda x: ones_like(x, dtype='float32'))
    model.train()
    logits = model(images)
    assert len(logits) == 2 and logits[0].shape == [2, config.dic['model']['num_classes'], 96, 96]
    loss = sum(loss_computation(logits_list=logits, labels=labels, losses=builder.loss, edges=None))
    loss.backward()
    optimizer.step()
    assert np.isfinite(float(loss))
    assert any('stem.0' in name for name in changed(before, model))
    without_decay = {p.name for group in optimizer._param_groups[:-1] for p in group['params']}
    assert without_decay == {p.name for layer in model.sublayers() if isinstance(layer, NORMS)
                             for p in (layer.weight, layer.bias)}


def as_in_paddle_2_4(monkeypatch):
    """PaddleDetection 2.6 takes tensors of shape [1] for numbers, which NumPy 2 refuses, and concatenates numbers."""
    concat = paddle.concat
    monkeypatch.setattr(paddle, 'concat', lambda x, axis=0, name=None: concat(
        [t.reshape([1]) if t.ndim == 0 else t for t in x], axis))
    for method, kind in (('__index__', int), ('__int__', int), ('__float__', float)):
        monkeypatch.setattr(paddle.Tensor, method, lambda tensor, kind=kind: kind(tensor.item()))


@pytest.mark.long
@pytest.mark.parametrize('path', DETECTION, ids=lambda path: path.stem)
def test_paddledetection_takes_a_training_step(path, registered, monkeypatch):
    workspace = pytest.importorskip('ppdet.core.workspace')
    pytest.importorskip('ppdet.modeling')
    import ppdet.optimizer  # noqa: F401 - registers the optimizers
    assert 'ppdet' in registered
    workspace.global_config['RepLKNetDet'].update({'norm_inter_features': False})
    config = workspace.load_config(str(path))
    config['RepLKNetDet'].update({'pretrained': None, 'variant_args': TINY})
    config['CascadeXConvNormHead'].update({'norm_type': 'bn', 'conv_dim': 8, 'out_channel': 16})  # CPUs have no sync_bn
    config['FPN']['out_channel'] = config['MaskFeat']['out_channel'] = 8
    config['RPNHead']['train_proposal'].update({'pre_nms_top_n': 50, 'post_nms_top_n': 20})
    config['BBoxAssigner']['batch_size_per_im'] = 16
    as_in_paddle_2_4(monkeypatch)
    paddle.seed(0)
    model = workspace.create(config.architecture)
    assert model.rpn_head.loss_rpn_bbox.beta == pytest.approx(1 / 9)
    optimizer = workspace.create('OptimizerBuilder')(config['LearningRate']['base_lr'], model)
    before = values(model)
    rng = np.random.default_rng(0)
    box = [8.0, 8.0, 60.0, 60.0]
    inputs = {
        'image': paddle.to_tensor(rng.standard_normal((1, 3, 96, 96)).astype('float32')),
        'im_id': paddle.to_tensor([[0]]), 'epoch_id': 0,
        'im_shape': paddle.to_tensor([[96.0, 96.0]]), 'scale_factor': paddle.to_tensor([[1.0, 1.0]]),
        'gt_bbox': [paddle.to_tensor([box])], 'gt_class': [paddle.to_tensor([[1]], dtype='int32')],
        'is_crowd': [paddle.to_tensor([[0]], dtype='int32')],
        'gt_poly': [[[np.array([8, 8, 60, 8, 60, 60, 8, 60], 'float64')]]]}
    model.train()
    losses = model(inputs)
    losses['loss'].backward()
    optimizer.step()
    assert np.isfinite(float(losses['loss'])) and {'loss_mask', 'loss_bbox_reg_stage2'} <= set(losses)
    assert any('stem.0' in name for name in changed(before, model))
