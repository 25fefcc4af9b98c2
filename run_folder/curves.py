"""Draws the curves of runs from their metrics.jsonl, as PNG."""
import math
import os

from atomic_file import atomic_file
from errors import UserError
from run_folder.metrics import METRICS, read_metrics

CURVES = 'curves.png'
PANELS = {  # title: value, events (those of steps are drawn faint where epochs have theirs as well), logarithmic
    'training loss': ('loss', ('step', 'train'), False), 'top-1 accuracy, %': ('acc1', ('eval',), False),
    'validation loss': ('loss', ('eval',), False), 'learning rate': ('lr', ('step',), False),
    'gradient norm': ('grad_norm', ('step',), True), 'images per second': ('images_per_s', ('step', 'train'), False),
    'loss scale': ('loss_scale', ('step',), True),
}
COLUMNS = 3


def draw_curves(folders, path):
    """Draws the curves of one or several runs over epochs, as PNG.

    Args:
        folders: run folders; the average of the weights (EMA) is dashed.
        path: PNG to write.
    Raises:
        UserError: matplotlib is not installed, or a run has recorded nothing yet.
        FileNotFoundError: see `read_metrics`.
    """
    runs = {folder: read_metrics(folder) for folder in folders}
    for folder, records in runs.items():
        if not any(record['event'] == 'step' for record in records):
            raise UserError(f'{os.path.join(folder, METRICS)}: has no steps of training to draw')
    try:
        from matplotlib.figure import Figure  # without pyplot there is no display and no global state
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError('matplotlib, which draws the curves, is not installed: pip install matplotlib') from None

    names = {folder: os.path.basename(os.path.normpath(folder)) for folder in runs}
    panels = {title: panel for title, panel in PANELS.items()
              if any(_points(records, panel[0], panel[1][0], None) for records in runs.values())}
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.4 * rows + 0.5), layout='constrained')
    for position, (title, (value, events, logarithmic)) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, position)
        for index, (folder, records) in enumerate(runs.items()):
            for event in events:
                for weights, style in (('model', '-'), ('model_ema', '--')) if event == 'eval' else ((None, '-'),):
                    points = _points(records, value, event, weights)
                    faint = event == 'step' and len(events) > 1
                    label = '' if faint else ' '.join(filter(None, (
                        names[folder] if len(runs) > 1 else '', {'model': 'model', 'model_ema': 'EMA'}.get(weights))))
                    epochs, values = zip(*points) if points else ((), ())
                    axes.plot(epochs, values, style, color=f'C{index}', alpha=0.35 if faint else 1, linewidth=1.4,
                              label=label or None, marker='.' if len(points) < 60 and not faint else None)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel('epoch')
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yscale('log' if logarithmic else 'linear')
        if value == 'lr':
            axes.ticklabel_format(axis='y', scilimits=(-2, 3))
        if value in ('lr', 'images_per_s'):
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        if events == ('eval',) or len(runs) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(', '.join(names.values()), fontsize=12)
    with atomic_file(path) as file:
        figure.savefig(file, format='png', dpi=110)


def _points(records, value, event, weights):
    """[(epoch, value)] of an event, of either weights where `weights` is None."""
    return [(r['epoch'], r[value]) for r in records if r['event'] == event and 'epoch' in r and
            r.get(value) is not None and weights in (None, r.get('weights'))]


def curves_line(folder):
    """Draws FOLDER/curves.png; returns what the log says of it: a run that is done does not fail for its picture."""
    path = os.path.join(folder, CURVES)
    try:
        draw_curves([folder], path)
        return f'curves in {path}'
    except Exception as error:
        return f'no {CURVES}: {" ".join(str(error).split()) or type(error).__name__}'
