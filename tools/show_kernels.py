"""Draws the depthwise kernels of a trained model: large, small and merged, their spectra, and how far they reach.

    python tools/show_kernels.py -model=output/RUN -output=kernels
    python tools/show_kernels.py -model=output/RUN -compare=initial -output=kernels    # before and after training
    python tools/show_kernels.py -model=output/RUN -compare=output/OTHER -output=kernels

Every kernel is multiplied by the scale of its batch norm, so that the merged kernel is the sum of the large and the
small one. The folder gets, for the last block of each stage, stage0.png, ...: the mean of the absolute weights and the
mean magnitude of the Fourier transform over all channels, and the kernels of some channels; reach.png: the share of the
absolute weights within a distance from the centre; and the numbers for all blocks: reach.csv and spectrum.csv.
Requires matplotlib.
"""
import csv
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from atomic_file import atomic_folder, refuse_taken  # noqa: E402
from deploy.layout import is_export  # noqa: E402
from deploy.predictor import load_model  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from evaluation.figures import require_matplotlib  # noqa: E402
from image_files.fonts import prepare_texts  # noqa: E402
from replknet import as_float64, batch_norm_affine, build_replknet  # noqa: E402

FORMS = ('large', 'small', 'merged')
INITIAL = 'initial'
CHANNELS = 5  # whose kernels are drawn
GRID = 64  # points of the Fourier transform per side: the kernels, of at most 63, are padded with zeros


@dataclass
class Kernel:
    """The kernels of one depthwise convolution, batch norm included.

    Attributes:
        model: name of the model; stage, block: numbers from 0; a block is a RepLKBlock and its ConvFFN.
        form: one of FORMS.
        weight: float64 [C, K, K].
    """
    model: str
    stage: int
    block: int
    form: str
    weight: np.ndarray


def kernels_of(model, name):
    """The `Kernel`s of a RepLKNet in eval mode, which has the merged form afterwards."""
    found = []
    for stage, layers in enumerate(model.stages):
        for block, layer in enumerate(layers.blocks[i].large_kernel for i in range(0, len(layers.blocks), 2)):
            branches = {} if layer.merged else {'large': layer.large_kernel_origin, 'small': layer.small_kernel_conv}
            for form, branch in branches.items():
                if branch is not None:
                    scale, _ = batch_norm_affine(branch.norm)
                    weight = as_float64(branch.conv.weight)[:, 0] * scale[:, None, None]
                    found.append(Kernel(name, stage, block, form, weight))
            layer.merge()
            found.append(Kernel(name, stage, block, 'merged', as_float64(layer.large_kernel_reparam.weight)[:, 0]))
    return found


def reach(weight):
    """Share of the absolute weights of all channels within each distance from the centre.

    Args:
        weight: [C, K, K].
    Returns:
        [(K + 1) / 2], for the distances 0, 1, ...: the share in the centred square of side 2 * distance + 1.
    """
    mass = np.abs(weight).sum(0)
    centre = len(mass) // 2
    squares = [mass[centre - d:centre + d + 1, centre - d:centre + d + 1].sum() for d in range(centre + 1)]
    return np.array(squares) / (squares[-1] or 1)


def spectrum(weight):
    """Mean magnitude of the Fourier transform over the channels.

    Args:
        weight: [C, K, K].
    Returns:
        [GRID, GRID], frequency 0 in the middle; the axes are `np.fft.fftshift(np.fft.fftfreq(GRID))`, cycles per pixel
        of the feature map.
    """
    total = np.zeros((GRID, GRID))
    for channel in weight:
        total += np.abs(np.fft.fft2(channel, (GRID, GRID)))
    return np.fft.fftshift(total) / len(weight)


def radial_mean(image):
    """Means of a spectrum over rings: [GRID / 2], of the frequencies [i, i + 1) / GRID."""
    axis = np.arange(GRID) - GRID // 2
    ring = np.hypot(*np.meshgrid(axis, axis)).astype(int)
    inside = ring < GRID // 2
    return np.bincount(ring[inside], image[inside]) / np.bincount(ring[inside])


def write_tables(kernels, folder):
    """Writes reach.csv and spectrum.csv."""
    for name, columns, values in (
            ('reach', ('distance', 'share'), lambda weight: enumerate(reach(weight))),
            ('spectrum', ('cycles_per_pixel', 'magnitude'),
             lambda weight: ((i / GRID, value) for i, value in enumerate(radial_mean(spectrum(weight)))))):
        text = io.StringIO()
        rows = csv.writer(text, lineterminator='\n')
        rows.writerow(['model', 'stage', 'block', 'form', 'kernel_size', *columns])
        for kernel in kernels:
            for x, y in values(kernel.weight):
                rows.writerow([kernel.model, kernel.stage, kernel.block, kernel.form, kernel.weight.shape[-1],
                               f'{x:g}', f'{y:.6g}'])
        Path(folder, f'{name}.csv').write_text(text.getvalue(), encoding='utf-8', errors='surrogateescape')


def _figure(width, height, layout='constrained'):
    from matplotlib.figure import Figure  # pyplot would need a display and keep global state
    return Figure(figsize=(width, height), layout=layout)


def _save(figure, path):
    prepare_texts(figure)
    figure.savefig(path, format='png', dpi=100)


def draw_stage(kernels, path):
    """Draws kernels of one block, a row for each."""
    width, height = 1.8 * (CHANNELS + 2) + 0.6, 1.8 * len(kernels) + 0.7
    figure = _figure(width, height, None)  # margins in inches; a constrained layout of so many cells takes seconds
    figure.subplots_adjust(0.6 / width, 0.05 / height, 1 - 0.05 / width, 1 - 0.6 / height, 0.05, 0.05)
    axes = figure.subplots(len(kernels), CHANNELS + 2, squeeze=False)
    channels = min(len(kernel.weight) for kernel in kernels)
    chosen = np.unique(np.linspace(0, channels - 1, CHANNELS).astype(int))
    for row, kernel in zip(axes, kernels):
        size = kernel.weight.shape[-1]
        row[0].set_ylabel(f'{kernel.model}\n{kernel.form} {size}x{size}', fontsize=9)
        row[0].imshow(np.abs(kernel.weight).mean(0), cmap='viridis', vmin=0)
        row[1].imshow(spectrum(kernel.weight), cmap='magma', vmin=0, extent=(-0.5, 0.5, -0.5, 0.5))
        for cell, channel in zip(row[2:], chosen):
            limit = np.abs(kernel.weight[channel]).max() or 1
            cell.imshow(kernel.weight[channel], cmap='RdBu_r', vmin=-limit, vmax=limit)
        for cell in row:
            cell.set_xticks([])
            cell.set_yticks([])
        for cell in row[2 + len(chosen):]:
            cell.axis('off')
    for cell, title in zip(axes[0], ['mean |weight|', 'mean |Fourier|', *(f'channel {c}' for c in chosen)]):
        cell.set_title(title, fontsize=9)
    figure.suptitle(f'stage {kernels[0].stage}, block {kernels[0].block}', fontsize=11)
    _save(figure, path)


def draw_reach(kernels, path):
    """Draws the reach of the large and merged kernels, mean over the blocks of each stage, against a uniform kernel."""
    stages = sorted({kernel.stage for kernel in kernels})
    models = list(dict.fromkeys(kernel.model for kernel in kernels))
    figure = _figure(3.3 * len(stages), 3.8)
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for stage, panel in zip(stages, panels):
        for number, model in enumerate(models):
            for form, style in (('large', '--'), ('merged', '-')):
                curves = [reach(k.weight) for k in kernels if (k.model, k.stage, k.form) == (model, stage, form)]
                if curves:
                    panel.plot(np.mean(curves, 0), style, color=f'C{number}', label=f'{model}, {form}', marker='.')
        longest = max(k.weight.shape[-1] for k in kernels if k.stage == stage)
        panel.plot((2 * np.arange((longest + 1) // 2) + 1) ** 2 / longest ** 2, ':', color='grey',
                   label='equal weights')
        panel.set_title(f'stage {stage}, {longest}x{longest}', fontsize=10)
        panel.set_xlabel('distance from the centre')
        panel.set_ylim(0, 1.02)
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('share of the absolute weights')
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc='outside lower center', ncols=5)
    _save(figure, path)


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    for flag, options in (
            ('model', {'required': True, 'help': 'zoo name, run folder or checkpoint'}),
            ('cfg', {'metavar': 'FILE', 'help': 'settings file (YAML), if there is none next to the weights'}),
            ('compare', {'metavar': 'MODEL', 'help': f"another model, or '{INITIAL}': -model with random weights"}),
            ('output', {'required': True, 'metavar': 'DIR', 'help': 'new folder'})):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)
    args = parser.parse_args(argv)
    for flag in ('model', 'compare'):
        if getattr(args, flag) and is_export(getattr(args, flag)):
            raise UserError(f'-{flag}={getattr(args, flag)}: is an exported program; name its weights instead')
    refuse_taken(args.output, 'output')
    require_matplotlib()
    return args


def main():
    args = read_arguments()
    paddle.set_device('cpu')
    model, config = load_model(args.model, args.cfg)
    pairs = [(args.model, model)]
    if args.compare == INITIAL:
        paddle.seed(0)
        untrained = build_replknet(config, merged=model.stages[0].blocks[0].large_kernel.merged)
        pairs.insert(0, (INITIAL, untrained))
    elif args.compare:
        pairs.insert(0, (args.compare, load_model(args.compare)[0]))
    if len({tuple(len(stage.blocks) for stage in network.stages) for _, network in pairs}) > 1:
        raise UserError(f'-compare={args.compare}: has other stages or numbers of blocks than {args.model}')
    names = [os.path.basename(os.path.normpath(name)) for name, _ in pairs]
    if len(set(names)) < len(names):
        names = [name for name, _ in pairs]
    if len(set(names)) < len(names):  # the same model twice, or a run folder with the name of INITIAL
        names = [f'{name} ({flag})' for name, flag in zip(names, ('-compare', '-model'))]
    kernels = [kernel for name, (_, network) in zip(names, pairs) for kernel in kernels_of(network, name)]
    with atomic_folder(args.output) as folder:
        write_tables(kernels, folder)
        for stage in range(len(model.stages)):
            own = [kernel for kernel in kernels if kernel.stage == stage]
            draw_stage([kernel for form in FORMS for kernel in own
                        if kernel.form == form and kernel.block == own[-1].block],
                       os.path.join(folder, f'stage{stage}.png'))
        draw_reach(kernels, os.path.join(folder, 'reach.png'))
    for kernel in kernels:
        if kernel.form == 'merged':
            shares = reach(kernel.weight)
            print(f'{kernel.model}, stage {kernel.stage}, block {kernel.block}: {kernel.weight.shape[-1]}x'
                  f'{kernel.weight.shape[-1]}, half of the absolute weights within distance '
                  f'{int(np.searchsorted(shares, 0.5))}')
    print(f'written to {args.output}')
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
