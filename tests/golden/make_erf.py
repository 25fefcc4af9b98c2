"""Computes effective receptive fields of tiny.pth with PyTorch, in float64: writes erf.npz beside this file.

    python tests/golden/make_erf.py        # needs torch and NumPy, not Paddle

The network is benchmarks/torch_replknet.py. The definition is that of the paper's code: the relu of the last feature
map's central position, summed over the channels; the relu of its gradient to the images, summed over the images and the
colours, and divided by the number of images. `areas` has the area ratio of the log-scaled `stage3` at 0.2, 0.3, 0.5
and 0.99, with squares that grow from the centre.
"""
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / 'benchmarks')]
from torch_replknet import RepLKNet  # noqa: E402

from port_weights.names import to_paddle_names  # noqa: E402
from port_weights.safe_load import find_weights, read_checkpoint  # noqa: E402


def load():
    model = RepLKNet(large_kernel_sizes=[31, 29, 27, 13], layers=[1, 1, 2, 1], channels=[8, 16, 24, 32], small_kernel=5,
                     dw_ratio=1, ffn_ratio=4, num_classes=10, merged=False)
    weights = to_paddle_names(find_weights(read_checkpoint(HERE / 'tiny.pth'))[0])
    weights['head.weight'] = weights['head.weight'].T
    model.load_state_dict({
        **{name.replace('_mean', 'running_mean').replace('_variance', 'running_var'): torch.from_numpy(array.copy())
           for name, array in weights.items()},
        **{name: value for name, value in model.state_dict().items() if name.endswith('num_batches_tracked')}})
    return model.double().eval()


def field(model, images, stage):
    images = images.clone().requires_grad_(True)
    x = model.forward_features(images)[stage]
    centre = torch.relu(x[:, :, x.shape[2] // 2, x.shape[3] // 2]).sum()
    gradient, = torch.autograd.grad(centre, images)
    return (torch.relu(gradient).sum((0, 1)) / len(images)).numpy()


def areas(values):
    height, width = values.shape
    ratios = []
    for threshold in (0.2, 0.3, 0.5, 0.99):
        margin = 0
        while True:
            square = values[height // 2 - margin:height // 2 + margin + 1, width // 2 - margin:width // 2 + margin + 1]
            if square.sum() / values.sum() > threshold:
                break
            margin += 1
        ratios.append((2 * margin + 1) ** 2 / (height * width))
    return ratios


def main():
    images = torch.from_numpy(np.load(HERE / 'input.npy')).double()
    model = load()
    official = np.load(HERE / 'expected_outputs.npz')
    with torch.no_grad():
        for stage, found in enumerate(model.forward_features(images)):
            np.testing.assert_allclose(found.numpy(), official[f'tiny_stage{stage}'], atol=1e-4)
    arrays = {f'stage{stage}': field(model, images, stage) for stage in (0, 3)}
    scaled = np.log10(arrays['stage3'] + 1)
    arrays['areas'] = areas(scaled / scaled.max())
    for module in model.modules():
        if hasattr(module, 'small_kernel_conv'):
            module.small_kernel_conv = None
    arrays['stage3_no_small_kernel'] = field(model, images, 3)
    np.savez_compressed(HERE / 'erf.npz', **{name: np.asarray(a, np.float32) for name, a in arrays.items()})


if __name__ == '__main__':
    main()
