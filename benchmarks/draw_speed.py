"""Draws docs/speed.png, the chart on the first screen of the README, from the results in docs/results.

    python benchmarks/draw_speed.py        # needs matplotlib: pip install -r requirements-bench.txt

Left: images per second of whole models, this project's as predict.py prepares them. Right: how many times faster the
large-kernel layer is than Paddle's and than the fastest other framework. Frameworks that are faster are drawn as well.
"""
import os
import sys

import harness
import numpy as np
from harness import ArgumentParser, UserError
from PIL import Image

OURS, OTHERS, PADDLE, TEXT, FAINT, LINES = '#d55e00', '#b4bcc6', '#5b6672', '#22272e', '#6a737d', '#d0d7de'
NAMES = {'packed': 'this project', 'custom': 'this project', 'stock': 'Paddle', 'inference-stock': 'Paddle Inference',
         'torch': 'torch', 'torch-channels-last': 'torch channels_last', 'onnxruntime': 'ONNX Runtime',
         'openvino': 'OpenVINO'}
PROCESSORS = {'cpu family 6, model 207': 'an Intel Xeon (Emerald Rapids)',
              'cpu family 25, model 17': 'an AMD EPYC (Zen 4)'}
STYLE = {'font.size': 8.5, 'text.color': TEXT, 'xtick.color': FAINT, 'ytick.color': TEXT, 'axes.edgecolor': LINES,
         'axes.titlesize': 8.5, 'axes.titlelocation': 'left', 'axes.titlepad': 6, 'axes.titlecolor': FAINT,
         'xtick.major.size': 0, 'ytick.major.size': 0}


def model_speeds(rows, ours, **case):
    """[(system, images per second)] of a case, the fastest first; `ours` is the only form of this project in it."""
    left_out = {'custom', 'packed', 'inference', 'fft', 'native'} - {ours}
    found = [(row['system'], float(row['images_per_s'])) for row in rows if row['system'] not in left_out
             and all(row[key] == value for key, value in case.items())]
    return sorted(found, key=lambda pair: -pair[1])


def layer_ratios(rows, mode, batch):
    """[(shape, times as fast as Paddle, times as fast as the fastest other framework)] of the large kernels."""
    cases = {}
    for row in rows:
        if row['mode'] == mode and row['batch'] == batch and int(row['kernel']) > 5:
            shape = '{kernel}×{kernel} on {height}×{width}'.format(**row)
            cases.setdefault(shape, {})[row['system']] = float(row['median_ms'])
    return [(shape, ms['native'] / ms['custom'],
             min(value for name, value in ms.items() if name not in ('custom', 'fft', 'native')) / ms['custom'])
            for shape, ms in cases.items()]


def draw_models(panel, speeds, title):
    """Bars of images per second, each with its value."""
    for place, (system, speed) in enumerate(speeds):
        mine = NAMES[system] == 'this project'
        panel.barh(place, speed, 0.7, color=OURS if mine else OTHERS)
        panel.text(speed + 0.015 * speeds[0][1], place + 0.03, f'{speed:.2f}', va='center',
                   fontweight='bold' if mine else 'normal')
    panel.set_yticks(range(len(speeds)), [NAMES[system] for system, _ in speeds])
    for label in panel.get_yticklabels():
        label.set_fontweight('bold' if label.get_text() == 'this project' else 'normal')
    panel.set_ylim(len(speeds) - 0.45, -0.55)
    panel.set_xlim(0, 1.14 * speeds[0][1])
    panel.set_xticks([])
    panel.set_title(title)
    panel.spines[['top', 'right', 'bottom']].set_visible(False)


def draw_layers(panel, ratios, title):
    """Two dots for each shape on a logarithmic axis: over the fastest other framework, and over Paddle."""
    for place, (_, paddle, other) in enumerate(ratios):
        panel.plot([1, paddle], [place, place], color='#e3e8ed', linewidth=2.2, zorder=1)
        for ratio, colour in ((other, OURS), (paddle, PADDLE)):
            panel.plot(ratio, place, 'o', color=colour, markersize=6, zorder=2)
            panel.annotate(f'{ratio:.1f}×' if ratio < 10 else f'{ratio:.0f}×', (ratio, place), (0, 5.5),
                           textcoords='offset points', ha='center', fontsize=7.5, color=colour)
    panel.axvline(1, color=LINES, linewidth=1, zorder=0)
    panel.set_xscale('log')
    panel.set_xlim(0.85, 1500)
    panel.set_xticks([1, 10, 100, 1000], ['1×', '10×', '100×', '1000×'], fontsize=7.5)
    panel.minorticks_off()
    panel.set_yticks(range(len(ratios)), [shape for shape, _, _ in ratios])
    panel.set_ylim(len(ratios) - 0.55, -0.75)
    panel.set_title(title)
    panel.spines[['top', 'right', 'left']].set_visible(False)


def draw(results, path):
    """Draws the chart from the folder `results` into the PNG `path`."""
    from matplotlib import pyplot
    (header, layers), (_, inference), (_, training) = (
        harness.read_csv(os.path.join(results, f'{name}.csv')) for name in ('dwconv', 'inference', 'training'))
    inference = model_speeds(inference, 'packed', suite='inference', merged='True', batch='8')
    training = model_speeds(training, 'custom', suite='training')
    pyplot.rcParams.update(STYLE)
    figure = pyplot.figure(figsize=(8.6, 4.3))
    left = figure.add_gridspec(2, 1, left=0.157, right=0.475, top=0.815, bottom=0.09, hspace=0.36,
                               height_ratios=(len(inference), len(training)))
    right = figure.add_gridspec(2, 1, left=0.663, right=0.985, top=0.815, bottom=0.135, hspace=0.55)
    figure.text(0.012, 0.94, 'RepLKNet-31B on a CPU: images per second', fontsize=10.5, fontweight='bold')
    figure.text(0.53, 0.94, 'The large-kernel layer alone: speed-up', fontsize=10.5, fontweight='bold')
    for place, colour, text in ((0.53, OURS, 'over the fastest other framework'), (0.79, PADDLE, 'over Paddle')):
        figure.text(place, 0.888, '●', color=colour, fontsize=8)
        figure.text(place + 0.016, 0.888, text, color=colour, fontsize=8)
    draw_models(figure.add_subplot(left[0]), inference, 'inference, batch 8')
    draw_models(figure.add_subplot(left[1]), training, 'training step, batch 4')
    draw_layers(figure.add_subplot(right[0]), layer_ratios(layers, 'forward', '8'), 'forward, batch 8')
    draw_layers(figure.add_subplot(right[1]), layer_ratios(layers, 'training', '4'), 'forward and gradients, batch 4')
    family = header['machine'].split(', ', 2)[-1]
    machine = f"{header['cores']} cores of {PROCESSORS.get(family, family)}"
    figure.text(0.012, 0.022, f"{machine}, float32, 224×224 images; {header['versions']}", fontsize=7, color=FAINT)
    figure.set_dpi(200)
    figure.canvas.draw()
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert('RGB').quantize(64).save(path, optimize=True)


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('-results', '--results', default=os.path.join(harness.ROOT, 'docs', 'results'), metavar='DIR',
                        help='folder with dwconv.csv, inference.csv and training.csv (%(default)s)')
    parser.add_argument('-output', '--output', default=os.path.join(harness.ROOT, 'docs', 'speed.png'),
                        metavar='FILE.png', help='chart to write (%(default)s)')
    arguments = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise UserError('matplotlib is missing: pip install -r requirements-bench.txt') from None
    matplotlib.use('Agg')
    draw(arguments.results, arguments.output)


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
