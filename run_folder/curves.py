"""Draws the curves of runs from their metrics.jsonl, as a PNG file."""
import math
import os
from typing import NamedTuple, Tuple

from atomic_file import atomic_file
from errors import UserError
from image_files.fonts import prepare_texts
from run_folder.layout import CURVES, METRICS
from run_folder.metrics import read_metrics


class Panel(NamedTuple):
    """One plot: a value of the records of some events, over epochs."""
    title: str
    value: str
    events: Tuple[str, ...]  # with two, the values of the steps are drawn faintly behind those of the epochs
    logarithmic: bool = False


PANELS = (
    Panel('training loss', 'loss', ('step', 'train')),
    Panel('top-1 accuracy, %', 'acc1', ('eval',)),
    Panel('mAP, %', 'mAP', ('eval',)),
    Panel('validation loss', 'loss', ('eval',)),
    Panel('learning rate', 'lr', ('step',)),
    Panel('gradient norm', 'grad_norm', ('step',), logarithmic=True),
    Panel('images per second', 'images_per_s', ('step', 'train')),
    Panel('loss scale', 'loss_scale', ('step',), logarithmic=True),
)
COLUMNS = 3
WEIGHTS = (('model', '-', 'model'), ('model_ema', '--', 'EMA'))  # in the records, line style, in the legend


def draw_curves(folders, path):
    """Draws the curves of one or more runs, each in its own colour, into one PNG file.

    Args:
        folders: run folders.
        path: PNG file to write.
    Raises:
        UserError: matplotlib is not installed, or a run has not recorded any training steps.
        FileNotFoundError: see `read_metrics`.
    """
    runs = {folder: read_metrics(folder) for folder in folders}
    for folder, records in runs.items():
        if not any(record['event'] == 'step' for record in records):
            raise UserError(f'{os.path.join(folder, METRICS)}: has no training steps to draw')
    try:
        from matplotlib.figure import Figure  # pyplot would need a display and keep global state
    except ImportError:
        raise UserError('matplotlib, which draws the curves, is not installed: pip install matplotlib') from None

    names = [os.path.basename(os.path.normpath(folder)) for folder in runs]
    panels = [panel for panel in PANELS
              if any(_points(records, panel.value, panel.events[0]) for records in runs.values())]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.4 * rows + 0.5), layout='constrained')
    for position, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, position)
        for index, (name, records) in enumerate(zip(names, runs.values())):
            _draw_run(axes, panel, records, f'C{index}', name if len(runs) > 1 else '')
        _label_axes(axes, panel)
        if panel.events == ('eval',) or len(runs) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(', '.join(names), fontsize=12)
    prepare_texts(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format='png', dpi=110)


def _draw_run(axes, panel, records, colour, name):
    """Draws the lines of one run in a panel; `name` is its name in the legend."""
    for event in panel.events:
        faint = event == 'step' and len(panel.events) > 1
        for weights, style, kind in WEIGHTS if event == 'eval' else ((None, '-', ''),):
            points = _points(records, panel.value, event, weights)
            epochs, values = zip(*points) if points else ((), ())
            label = None if faint else ' '.join(filter(None, (name, kind))) or None
            axes.plot(epochs, values, style, color=colour, alpha=0.35 if faint else 1, linewidth=1.4, label=label,
                      marker='.' if len(points) < 60 and not faint else None)


def _points(records, value, event, weights=None):
    """[(epoch, value)] of the records of an event; `weights` selects those of the model or of the EMA."""
    return [(r['epoch'], r[value]) for r in records if r['event'] == event and 'epoch' in r and
            r.get(value) is not None and weights in (None, r.get('weights'))]


def _label_axes(axes, panel):
    from matplotlib.ticker import LogFormatter, MaxNLocator
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel('epoch')
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.logarithmic:
        axes.set_yscale('log')
        axes.yaxis.set_major_formatter(LogFormatter())  # the default writes formulas, which `prepare_texts` shows raw
        axes.yaxis.set_minor_formatter(LogFormatter())
    if panel.value == 'lr':
        axes.ticklabel_format(axis='y', scilimits=(-2, 3))
    if panel.value in ('lr', 'images_per_s'):
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)


def curves_line(folder):
    """Draws FOLDER/curves.png and returns a line for the log; a failure is only reported, as the run itself is done."""
    path = os.path.join(folder, CURVES)
    try:
        draw_curves([folder], path)
        return f'curves in {path}'
    except Exception as error:
        return f'no {CURVES}: {" ".join(str(error).split()) or type(error).__name__}'
