"""Draws the pictures of docs/benchmarks.md from the results of bench_dwconv.py and bench_model.py.

    python benchmarks/plot.py -dwconv=results/dwconv.csv -model=results/model.csv -output=docs
"""
import argparse
import os
import sys

import harness
from harness import UserError

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = {'custom': '#d55e00', 'inference': '#e69f00', 'torch-channels-last': '#0072b2', 'torch': '#56b4e9',
           'openvino': '#009e73', 'onnxruntime': '#cc79a7', 'fft': '#999999', 'native': '#333333'}
NAMES = {'custom': 'this project', 'inference': 'this project, Paddle Inference', 'fft': 'paddle.fft',
         'native': 'Paddle', 'torch': 'torch', 'torch-channels-last': 'torch channels_last',
         'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}


def draw_layers(pyplot, rows, path):
    """Bars of GFLOP/s: large kernels at 224, forward at batch 8 and training at batch 4."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout='constrained')
    for panel, mode, batch, title in ((panels[0], 'forward', 8, 'forward, batch 8'),
                                      (panels[1], 'training', 4, 'forward and both gradients, batch 4')):
        chosen = [r for r in rows if r['mode'] == mode and int(r['batch']) == batch and int(r['kernel']) > 5]
        shapes = list(dict.fromkeys((r['channels'], r['height'], r['kernel']) for r in chosen))
        systems = [name for name in COLOURS if any(r['system'] == name for r in chosen)]
        width = 0.85 / max(1, len(systems))
        for index, name in enumerate(systems):
            speed = {(r['channels'], r['height'], r['kernel']): float(r['gflops'])
                     for r in chosen if r['system'] == name}
            places = [i + (index - (len(systems) - 1) / 2) * width for i, shape in enumerate(shapes) if shape in speed]
            panel.bar(places, [speed[shape] for shape in shapes if shape in speed], width, color=COLOURS[name],
                      label=NAMES[name])
        peaks = [float(r['peak_gflops']) for r in chosen if r['peak_gflops']]
        if peaks:
            panel.axhline(sum(peaks) / len(peaks), color='black', linestyle='--', linewidth=1)
            panel.annotate('multiply-add peak of the processor', (0.01, sum(peaks) / len(peaks)), (0, 3),
                           xycoords=('axes fraction', 'data'), textcoords='offset points', fontsize=8)
        panel.set_xticks(range(len(shapes)), [f'{c} channels\n{h}x{h}, kernel {k}' for c, h, k in shapes])
        panel.set_yscale('log')
        panel.set_title(title, fontsize=10)
        panel.grid(axis='y', alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('GFLOP/s over the taps inside the image')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=7, fontsize=8,
                  frameon=False)
    figure.savefig(path, dpi=110)


def draw_growth(pyplot, rows, path):
    """Lines of the cost of an image against kernel area, pixels and batch."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.8), layout='constrained')
    axes = {
        'kernel': ('kernel area, the same in all stages', lambda r: int(r['kernels'].split()[0]) ** 2,
                   lambda r: r['kernels'].split()[0] + '²'),
        'size': ('pixels of the image', lambda r: int(r['size']) ** 2, lambda r: r['size'] + '²'),
        'batch': ('batch', lambda r: int(r['batch']), lambda r: r['batch']),
    }
    for panel, (suite, (label, place, tick)) in zip(panels, axes.items()):
        chosen = [r for r in rows if r['suite'] == suite]
        for name in COLOURS:
            points = sorted((place(r), float(r['median_ms']) / int(r['batch'])) for r in chosen if r['system'] == name)
            if points:
                panel.plot(*zip(*points), 'o-', markersize=4, color=COLOURS[name], label=NAMES[name])
                if suite == 'size' and name in ('custom', 'inference'):
                    (x, y), (end, _) = points[0], points[-1]
                    panel.plot([x, end], [y, y * end / x], ':', color=COLOURS[name], linewidth=1)
        ticks = sorted({(place(r), tick(r)) for r in chosen})
        if suite == 'size':
            panel.set_xscale('log')
            panel.set_yscale('log')
        elif suite == 'kernel':
            ticks = [(x, text) for x, text in ticks if x not in (9, 49)]  # too close to each other
        if ticks:
            panel.set_xticks(*zip(*ticks))
            panel.minorticks_off()
        if suite != 'size':
            panel.set_ylim(bottom=0)
        panel.set_xlabel(label)
        panel.set_ylabel('ms an image')
        panel.grid(alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8,
                  frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, text in (('dwconv', 'CSV of bench_dwconv.py'), ('model', 'CSV of bench_model.py')):
        parser.add_argument(f'-{flag}', f'--{flag}', default='', help=text)
    parser.add_argument('-output', '--output', default='docs', help='folder of the pictures (%(default)s)')
    arguments = parser.parse_args()
    if not (arguments.dwconv or arguments.model):
        raise UserError('nothing to draw: name a file with -dwconv or -model')
    try:
        import matplotlib
    except ImportError:
        raise UserError('matplotlib is missing: pip install -r requirements-bench.txt') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot
    os.makedirs(arguments.output, exist_ok=True)
    for path, draw, name in ((arguments.dwconv, draw_layers, 'benchmarks_layers.png'),
                             (arguments.model, draw_growth, 'benchmarks_growth.png')):
        if path:
            draw(pyplot, harness.read_csv(path)[1], os.path.join(arguments.output, name))
            print(os.path.join(arguments.output, name))


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
