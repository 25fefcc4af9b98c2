"""Backbones for dense prediction, under a small head like UPerNet's, on made-up segmentation data."""
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import yaml
from paddle import nn

import dense
from errors import UserError
from replknet import RepLKNet
from run_folder.checkpoint import model_arrays
from zoo import ZOO

ROOT = Path(__file__).parents[1]
TINY = {'layers': [1, 1, 1, 1], 'channels': [8, 12, 16, 20], 'large_kernel_sizes': [9, 7, 5, 5]}


def resize(x, like):
    return F.interpolate(x, like.shape[2:], mode='bilinear')


class Head(nn.Layer):
    """Pyramid pooling on the deepest map, a feature pyramid over all, and a class for each pixel of the finest."""

    def __init__(self, in_channels, classes, channels=16, pools=(1, 2)):
        super().__init__()
        self.pools = pools
        self.pooled = nn.LayerList([nn.Conv2D(in_channels[-1], channels, 1) for _ in pools])
        self.bottleneck = nn.Conv2D(in_channels[-1] + channels * len(pools), channels, 3, padding=1)
        self.laterals = nn.LayerList([nn.Conv2D(c, channels, 1) for c in in_channels[:-1]])
        self.classify = nn.Conv2D(channels * len(in_channels), classes, 1)

    def forward(self, features):
        deepest = features[-1]
        maps = [F.relu(self.bottleneck(paddle.concat([deepest] + [
            resize(conv(F.adaptive_avg_pool2d(deepest, size)), deepest)
            for size, conv in zip(self.pools, self.pooled)], axis=1)))]
        for lateral, feature in zip(reversed(self.laterals), reversed(features[:-1])):
            maps.insert(0, F.relu(lateral(feature) + resize(maps[0], feature)))
        return self.classify(paddle.concat([maps[0]] + [resize(x, maps[0]) for x in maps[1:]], axis=1))


def scenes(rng, count, size=64):
    """Bright squares and dark ones on noise: [count, 3, size, size] and the class of each pixel, 0 to 2."""
    images, labels = rng.normal(size=(count, 3, size, size)), np.zeros((count, size, size), np.int64)
    for image, label in zip(images, labels):
        for number, shift in ((1, 3), (2, -3)):
            y, x = rng.integers(0, size - 24, 2)
            image[:, y:y + 24, x:x + 24] += shift
            label[y:y + 24, x:x + 24] = number
    return images.astype(np.float32), labels


@pytest.mark.parametrize('kind', [dense.RepLKNetSeg, dense.RepLKNetDet])
def test_a_pyramid_head_learns_and_gradients_reach_the_stem(kind):
    paddle.seed(0)
    rng = np.random.default_rng(0)
    backbone = kind(variant_args=TINY, norm_inter_features=True, drop_path=0.1)
    head = Head(backbone.feat_channels, 3)
    optimizer = paddle.optimizer.AdamW(3e-3, parameters=backbone.parameters() + head.parameters())
    losses = []
    for step in range(12):
        images, labels = map(paddle.to_tensor, scenes(rng, 4))
        features = backbone({'image': images} if kind is dense.RepLKNetDet else images)
        logits = head(features)
        loss = F.cross_entropy(resize(logits, images), labels, axis=1)
        loss.backward()
        if step == 0:
            trained = [p for p in backbone.parameters() if not p.stop_gradient]
            assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in trained)
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert np.mean(losses[-3:]) < 0.6 * losses[0], losses


def test_shapes_are_those_that_heads_and_necks_read():
    backbone = dense.RepLKNetDet(variant_args=TINY, out_indices=(1, 3))
    maps = backbone({'image': paddle.zeros([1, 3, 64, 96])})
    assert backbone.feat_channels == [12, 20] == [x.shape[1] for x in maps]
    assert [(s.channels, s.stride) for s in backbone.out_shape] == [(12, 8), (20, 32)]
    assert [x.shape[2:] for x in maps] == [[64 // s.stride, 96 // s.stride] for s in backbone.out_shape]


def test_weights_of_a_classifier_load_into_a_backbone(tmp_path):
    model = RepLKNet(**TINY, num_classes=5)
    paddle.save({name: paddle.to_tensor(array) for name, array in model_arrays(model).items()},
                str(tmp_path / 'w.pdparams'))
    backbone = dense.RepLKNetSeg(variant_args=TINY, pretrained=str(tmp_path / 'w.pdparams'))
    model.eval(), backbone.eval()
    x = paddle.randn([1, 3, 64, 64])
    assert all(map(np.array_equal, backbone(x), model.forward_features(x)))


def test_mistakes(run_script):
    with pytest.raises(UserError, match='choose from replknet_31b'):
        dense.RepLKNetSeg('resnet50')
    done = run_script('dense.py')
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('usage: python dense.py SCRIPT')


def packages(folder):
    """Stand-ins for the parts of the two packages that dense.py uses."""
    for name, text in {
            'paddleseg/__init__.py': '', 'paddleseg/cvlibs/__init__.py': '', 'ppdet/__init__.py': '',
            'ppdet/core/__init__.py': '',
            'paddleseg/cvlibs/manager.py': 'class BACKBONES:\n    add_component = staticmethod(print)\n',
            'ppdet/core/workspace.py': 'register, serializable = print, lambda cls: cls\n'}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_scripts_of_the_packages_run_with_the_backbones_registered(run_script, tmp_path):
    packages(tmp_path)
    (tmp_path / 'train.py').write_text('import sys\nprint(__name__, sys.argv)\n')
    done = run_script('dense.py', tmp_path / 'train.py', '--config', 'x.yml', PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "<class '__main__.RepLKNetSeg'>", "<class '__main__.RepLKNetDet'>",
        f"__main__ {[f'{tmp_path}/train.py', '--config', 'x.yml']}"]


# ---- the packages themselves, with the configurations of configs/dense

CONFIGS = sorted((ROOT / 'configs/dense').glob('*.yml'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configurations_name_variants_and_weights_that_exist(path):
    settings = yaml.safe_load(path.read_text().replace('!PiecewiseDecay', '').replace('!LinearWarmup', ''))
    backbone = settings['RepLKNetDet'] if 'RepLKNetDet' in settings else settings['model']['backbone']
    assert ZOO[backbone['pretrained']].variant == backbone['variant']
    assert backbone['norm_inter_features'] == (backbone['variant'] == 'replknet_xl')
    assert ('[0.5, 0.5, 0.5]' in path.read_text()) == (backbone['variant'] == 'replknet_xl')


@pytest.mark.long
def test_a_step_of_paddleseg():
    pytest.importorskip('paddleseg')
    from paddleseg.cvlibs import Config, SegBuilder
    assert 'paddleseg' in dense.register()
    config = Config(str(ROOT / 'configs/dense/upernet_replknet_31b_1k_ade20k_512.yml'))
    backbone = config.dic['model']['backbone']
    del backbone['pretrained'], backbone['variant'], backbone['recompute']
    backbone['variant_args'] = TINY
    config.dic['model']['channels'] = 16
    builder = SegBuilder(config)
    model, optimizer = builder.model, builder.optimizer
    images, labels = map(paddle.to_tensor, scenes(np.random.default_rng(0), 2, 128))
    outputs = model(images)
    loss = sum(c * F.cross_entropy(x, labels, axis=1) for c, x in zip((1, 0.4), outputs))
    loss.backward()
    before = model.backbone.stem[0].conv.weight.numpy()
    optimizer._learning_rate.step()
    optimizer.step()
    assert np.isfinite(float(loss)) and not np.array_equal(before, model.backbone.stem[0].conv.weight.numpy())


@pytest.mark.long
def test_a_step_of_paddledetections_backbone_and_neck(tmp_path):
    # its region proposals fail on Paddle 3: they concatenate tensors without a dimension
    pytest.importorskip('ppdet')
    import ppdet.modeling  # noqa: F401 - registers the modules
    import ppdet.optimizer  # noqa: F401
    from ppdet.core.workspace import create, load_config
    assert 'ppdet' in dense.register()
    lines = (ROOT / 'configs/dense/cascade_mask_rcnn_replknet_31b_1k_coco.yml').read_text().splitlines()
    small = [line.replace('sync_bn', 'bn') for line in lines  # without COCO's base files and synchronised norms
             if not line.startswith('_BASE_') and 'pretrained:' not in line and 'recompute:' not in line]
    file = tmp_path / 'small.yml'
    file.write_text('num_classes: 80\nmetric: COCO\nuse_gpu: false\n' + '\n'.join(small))
    config = load_config(str(file))
    config['RepLKNetDet']['variant_args'] = TINY
    model = create(config.architecture)
    rate = create('LearningRate')(2)
    optimizer = create('OptimizerBuilder')(rate, model)
    model.train()
    maps = model.neck(model.backbone({'image': paddle.randn([1, 3, 128, 128])}))
    assert [x.shape[1:] for x in maps] == [[256, side, side] for side in (32, 16, 8, 4, 2)]
    assert len(model.bbox_head.head.head_list) == 3 and model.with_mask
    sum(x.square().mean() for x in maps).backward()
    before = model.backbone.stem[0].conv.weight.numpy()
    rate.step()
    optimizer.step()
    assert not np.array_equal(before, model.backbone.stem[0].conv.weight.numpy())
