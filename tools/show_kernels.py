"""Draws the depthwise kernels of a model, and measures how far from the centre their mass lies.

    python tools/show_kernels.py -model=output/RUN -output=kernels
    python tools/show_kernels.py -model=output/RUN -before=output/RUN/epoch_0001.pdparams -output=kernels

For each stage, kernels_N.png shows the large, small and merged kernels of its first block and their Fourier magnitude,
averaged over the channels and for the channels with the largest kernels. mass.png and mass.json have the share of the
merged kernels' mass, the sum of |weight|, within each distance from the centre: max(|dx|, |dy|) taps. Weights are those
after folding the batch norm. Merged weights have only merged kernels. Requires matplotlib.
"""
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402

from atomic_file import atomic_file  # noqa: E402
from deploy.predictor import load_model  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from evaluation.figures import require_matplotlib  # noqa: E402
from image_files.fonts import prepare_texts  # noqa: E402
from replknet import RepLKBlock, as_float64, batch_norm_affine  # noqa: E402

CHANNELS = 4  # drawn of each block


def kernels_of(branch):
    """The kernels of a `ReparamLargeKernelConv`, with batch norms folded: {'large', 'small', 'merged': [C, K, K]}.

    Those of a merged convolution are {'merged'}; without a small kernel, there is no 'small'. All have the size of the
    large kernel, the small one being padded with zeros.
    """
    if branch.merged:
        return {'merged': as_float64(branch.large_kernel_reparam.weight)[:, 0]}
    found = {}
    for name, part in (('large', branch.large_kernel_origin), ('small', branch.small_kernel_conv)):
        if part is not None:
            scale, _ = batch_norm_affine(part.norm)
            found[name] = as_float64(part.conv.weight)[:, 0] * scale[:, None, None]
    if 'small' in found:
        margin = (found['large'].shape[-1] - found['small'].shape[-1]) // 2
        found['small'] = np.pad(found['small'], [(0, 0), (margin, margin), (margin, margin)])
    found['merged'] = found['large'] + found.get('small', 0)
    return found


def mass_within(kernels):
    """Share of sum |weight| of [C, K, K] at distances max(|dx|, |dy|) up to 0, 1, ..., K // 2 from the centre."""
    half = kernels.shape[-1] // 2
    total = np.abs(kernels).sum()
    return [float(np.abs(kernels[:, half - d:half + d + 1, half - d:half + d + 1]).sum() / total) if total else 0.0
            for d in range(half + 1)]


def spectrum(kernels):
    """Fourier magnitude of [C, K, K] at 64 x 64 frequencies, the constant one in the middle: [C, 64, 64]."""
    return np.fft.fftshift(np.abs(np.fft.fft2(kernels, (64, 64))), (-2, -1))


def blocks_of(model):
    """{(stage, number of the RepLKBlock in it): kernels} of a RepLKNet."""
    return {(stage, number): kernels_of(block.large_kernel)
            for stage, layers in enumerate(model.stages)
            for number, block in enumerate(b for b in layers.blocks if isinstance(b, RepLKBlock))}


def draw_kernels(kernels, title, path):
    """Draws the kernels of a block, one kind per pair of rows: weights above, Fourier magnitude below."""
    from matplotlib.figure import Figure  # pyplot would need a display and keep global state
    strongest = np.argsort(-np.abs(kernels['merged']).sum((1, 2)))[:CHANNELS]
    columns = ['mean of |weight|', *(f'channel {channel}' for channel in strongest)]
    figure = Figure(figsize=(2.1 * len(columns), 4.3 * len(kernels)), layout='constrained')
    axes = figure.subplots(2 * len(kernels), len(columns), squeeze=False)
    for row, (kind, values) in enumerate(kernels.items()):
        for offset, maps, name in ((0, values, f'{kind} kernel'), (1, spectrum(values), f'{kind}: Fourier magnitude')):
            for column, cell in enumerate(axes[2 * row + offset]):
                image = np.abs(maps).mean(0) if column == 0 else maps[strongest[column - 1]]
                limit = np.abs(image).max() or 1
                signed = offset == 0 and column > 0
                cell.imshow(image, cmap='RdBu_r' if signed else 'viridis', vmin=-limit if signed else 0, vmax=limit)
                cell.set_xticks([])
                cell.set_yticks([])
                if offset == 0:
                    cell.set_title(columns[column], fontsize=9)
            axes[2 * row + offset][0].set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_mass(mass, path):
    """Draws {name of a model: {'stage.block': shares}}: one panel per model, one line per block."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.5 * len(mass), 4), layout='constrained')
    for axes, (model, blocks) in zip(figure.subplots(1, len(mass), squeeze=False)[0], mass.items()):
        for name, shares in blocks.items():
            axes.plot(shares, marker='.', color=f'C{name.split(".")[0]}', label=f'block {name}', linewidth=1.2)
        axes.set_title(model, fontsize=10)
        axes.set_xlabel('distance from the centre, taps')
        axes.set_ylabel('share of the mass within')
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        if len(blocks) <= 12:
            axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure, path):
    prepare_texts(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format='png', dpi=100)


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)
    for flag, options in (
            ('model', {'required': True, 'help': 'zoo name, run folder or checkpoint'}),
            ('before', {'metavar': 'MODEL', 'help': 'the same model earlier in training, to compare with'}),
            ('output', {'required': True, 'metavar': 'DIR', 'help': 'new folder'}),
            ('cfg', {'metavar': 'FILE', 'help': 'settings file (YAML), if there is none next to the weights'})):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)
    args = parser.parse_args(argv)
    if os.path.exists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
        raise UserError(f'-output={args.output}: is not empty; name a new folder')
    return args


def main():
    args = read_arguments()
    require_matplotlib()
    models = {'before': args.before, 'after': args.model} if args.before else {'model': args.model}
    found = {name: blocks_of(load_model(model, args.cfg)[0]) for name, model in models.items()}
    os.makedirs(args.output, exist_ok=True)
    mass = {}
    for name, blocks in found.items():
        mass[name] = {f'{stage}.{number}': mass_within(kernels['merged'])
                      for (stage, number), kernels in blocks.items()}
        for (stage, number), kernels in blocks.items():
            if number == 0:
                suffix = '' if name == 'model' else f'_{name}'
                draw_kernels(kernels, f'{models[name]}, stage {stage}, first block',
                             os.path.join(args.output, f'kernels_{stage}{suffix}.png'))
    draw_mass(mass, os.path.join(args.output, 'mass.png'))
    with atomic_file(os.path.join(args.output, 'mass.json')) as file:
        file.write(json.dumps(mass, indent=1).encode())
    for name, blocks in mass.items():
        for block, shares in blocks.items():
            print(f'{name} block {block}: {2 * len(shares) - 1}x{2 * len(shares) - 1}, '
                  f'{shares[min(2, len(shares) - 1)]:.1%} of the mass within the central 5x5')
    print(f'written to {args.output}')
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
