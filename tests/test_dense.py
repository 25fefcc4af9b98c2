"""Backbones for dense prediction, under a small head like UPerNet's, on made-up segmentation data."""
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

import dense
from errors import UserError
from replknet import RepLKNet
from run_folder.checkpoint import model_arrays

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
            'ppdet/core/workspace.py': 'register, serializable, global_config = print, lambda cls: cls, {}\n'}.items():
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
