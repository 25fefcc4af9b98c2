"""Fills docs/benchmarks.md with the results of bench_dwconv.py and bench_model.py and draws its charts.

    python benchmarks/report.py docs/results/*.csv

Each file replaces its own sections of the page, between <!-- NAME --> and <!-- end -->; other sections stay unchanged.
NAME is that of a suite, and for models other than RepLKNet-31B SUITE-MODEL. The charts show only the given files.
"""
import os
import re
import sys

import harness
from harness import ArgumentParser, UserError

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = {'custom': '#d55e00', 'inference': '#e69f00', 'torch-channels-last': '#0072b2', 'torch': '#56b4e9',
           'openvino': '#009e73', 'onnxruntime': '#cc79a7', 'fft': '#999999', 'native': '#333333'}
NAMES = {'custom': 'this project', 'packed': 'this project, packed', 'inference': 'this project, Paddle Inference',
         'fft': 'this project, fft', 'native': 'Paddle', 'stock': 'stock Paddle',
         'inference-stock': 'stock Paddle Inference', 'torch': 'torch', 'torch-channels-last': 'torch channels_last',
         'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO', 'custom-bf16': 'this project, bfloat16',
         'inference-bf16': 'this project, Paddle Inference, bfloat16',
         'inference-int8': 'this project, Paddle Inference, int8', 'torch-bf16': 'torch channels_last, bfloat16',
         'openvino-default': "OpenVINO's default"}
MODEL = 'replknet_31b'
MODEL_NAMES = {**NAMES, 'native': 'this project, native'}


# ---- tables

def number(value):
    """The value with three significant digits, without an exponent."""
    return f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'


def layer_tables(rows):
    """{section: Markdown table} for bench_dwconv.py: milliseconds of every system, and the speedups of `custom`."""
    sections = {}
    for mode in ('forward', 'training'):
        chosen = [row for row in rows if row['mode'] == mode]
        systems = list(dict.fromkeys(row['system'] for row in chosen))
        cases = {}
        for row in chosen:
            cases.setdefault('{batch} x {channels} x {height} x {width}, k{kernel}'.format(**row)
                             + (', stride 2' if row['stride'] == '2' else ''), {})[row['system']] = row
        table = []
        for shape, found in cases.items():
            ms = {name: float(row['median_ms']) for name, row in found.items()}
            others = [value for name, value in ms.items() if name not in ('custom', 'fft', 'native')]
            share = found['custom']['share_of_peak'] if 'custom' in found else ''
            table.append([shape, *(number(ms[name]) if name in ms else '' for name in systems),
                          f'{float(share):.0%}' if share else '',
                          *(number(value / ms['custom']) if value and 'custom' in ms else ''
                            for value in (ms.get('native'), min(others, default=None)))])
        sections[mode] = harness.table(['batch x channels x size, kernel', *(NAMES[name] for name in systems),
                                        'share of peak', 'over Paddle', 'over the fastest other'], table)
    return sections


def model_tables(rows):
    """{section: Markdown table} for the suites in a file of bench_model.py."""
    sections = {}
    for suite in dict.fromkeys(row['suite'] for row in rows):
        chosen = [row for row in rows if row['suite'] == suite]
        if suite in ('inference', 'training', 'rounded', 'rounded-training'):
            ours = {(row['batch'], row['merged']): float(row['median_ms'])
                    for row in chosen if row['system'] == ('inference' if suite == 'rounded' else 'custom')}
            sections['training-step' if suite == 'training' else suite] = harness.table(
                ['form', 'batch', 'system', 'ms', 'images/s', 'peak MB', 'ms over this project in Paddle'],
                [['merged' if row['merged'] == 'True' else 'training', row['batch'], MODEL_NAMES[row['system']],
                  number(float(row['median_ms'])), number(float(row['images_per_s'])), row['peak_mb'],
                  f'{float(row["median_ms"]) / ours[row["batch"], row["merged"]]:.2f}'
                  if (row['batch'], row['merged']) in ours else ''] for row in chosen])
            continue
        column = {'kernel': 'kernels', 'size': 'size', 'batch': 'batch'}[suite]
        systems = list(dict.fromkeys(row['system'] for row in chosen))
        cases = {}
        for row in chosen:
            cases.setdefault(row[column].split()[0], {})[row['system']] = row
        sections[suite] = harness.table(
            [suite, *(f'{MODEL_NAMES[name]}, ms (MB)' for name in systems)],
            [[value, *(f'{number(float(found[name]["min_ms"]))} ({found[name]["peak_mb"]})' if name in found else ''
                       for name in systems)] for value, found in cases.items()])
    return sections


def provenance(header):
    """Command, machine and versions of a file of results as Markdown."""
    facts = '; '.join(f'{name}: {text}' for name, text in header.items() if name != 'command')
    return f'```\n{header["command"]}\n```\n\n{facts}.\n'


def fill(page, sections):
    """Replaces the text of sections of a page; returns the new page.

    Raises:
        UserError: the page lacks one of the sections.
    """
    for name, text in sections.items():
        page, count = re.subn(rf'(<!-- {name} -->\n).*?(<!-- end -->)',
                              lambda match, text=text: f'{match[1]}{text}\n{match[2]}', page, flags=re.DOTALL)
        if count != 1:
            raise UserError(f'the page has no section <!-- {name} --> ... <!-- end -->')
    return page


# ---- charts

def draw_layers(pyplot, rows, path):
    """Bar charts of GFLOP/s of the large kernels at 224x224: forward at batch 8, training at batch 4."""
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
            panel.annotate('multiply-add peak of the processor', (0.99, sum(peaks) / len(peaks)), (0, 3),
                           xycoords=('axes fraction', 'data'), textcoords='offset points', fontsize=8, ha='right')
        panel.set_xticks(range(len(shapes)), [f'{c} channels\n{h}x{h}, k{k}' for c, h, k in shapes], fontsize=9)
        panel.set_yscale('log')
        panel.yaxis.set_major_formatter('{x:g}')
        panel.set_title(title, fontsize=10)
        panel.grid(axis='y', alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('GFLOP/s over the taps inside the image')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=7, fontsize=8,
                  frameon=False)
    figure.savefig(path, dpi=110)


def draw_growth(pyplot, rows, path):
    """Line charts of the time per image against kernel area, number of pixels and batch size."""
    from matplotlib.ticker import LogLocator
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
            points = sorted((place(r), float(r['min_ms']) / int(r['batch'])) for r in chosen if r['system'] == name)
            if points:
                panel.plot(*zip(*points), 'o-', markersize=4, color=COLOURS[name], label=NAMES[name])
                if suite == 'size' and name in ('custom', 'inference'):
                    (x, y), (end, _) = points[0], points[-1]
                    panel.plot([x, end], [y, y * end / x], ':', color=COLOURS[name], linewidth=1)
        ticks = sorted({(place(r), tick(r)) for r in chosen})
        if suite == 'size':
            panel.set_xscale('log')
            panel.set_yscale('log')
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter('{x:g}')
        elif suite == 'kernel':
            ticks = [(x, text) for x, text in ticks if x not in (9, 49)]  # their labels would overlap the next ones
        if ticks:
            panel.set_xticks(*zip(*ticks))
            panel.minorticks_off()
        if suite != 'size':
            panel.set_ylim(0, panel.get_ylim()[1] * 1.05)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('ms an image')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8,
                  frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('results', nargs='+', help='CSV files of bench_dwconv.py and bench_model.py')
    parser.add_argument('-page', '--page', default=os.path.join(harness.ROOT, 'docs', 'benchmarks.md'),
                        help='page to fill; PAGE_layers.png and PAGE_growth.png are written next to it (%(default)s)')
    arguments = parser.parse_args()
    results = [harness.read_csv(path) for path in arguments.results]
    try:
        import matplotlib
    except ImportError:
        raise UserError('matplotlib is missing: pip install -r requirements-bench.txt') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot
    with open(arguments.page, encoding='utf-8') as file:
        page = file.read()
    layers, growth = [], []
    for header, rows in results:
        is_layers = 'stride' in rows[0]
        layers += rows if is_layers else []
        growth += [] if is_layers else [row for row in rows if row['suite'] in ('batch', 'size', 'kernel')]
        sections = layer_tables(rows) if is_layers else model_tables(rows)
        model = header.get('model', MODEL)
        page = fill(page, {name if model == MODEL else f'{name}-{model}': f'{provenance(header)}\n{text}'
                           for name, text in sections.items()})
    for draw, rows, name in ((draw_layers, layers, 'layers'), (draw_growth, growth, 'growth')):
        if rows:
            draw(pyplot, rows, f'{os.path.splitext(arguments.page)[0]}_{name}.png')
    with harness.atomic_file(arguments.page) as file:
        file.write(page.encode())


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
