"""What can be watched of a run: metrics.jsonl, VisualDL scalars, and a picture of the curves.

metrics.jsonl has one JSON object per line, with `event`, `time`, `epoch` and `step` (optimizer steps done):
'step' every REPORT_FREQ steps (loss, lr, grad_norm, loss_scale, images_per_s; its epoch is a fraction), 'train' after
each epoch, and 'eval' after each evaluation (`weights` 'model' or 'model_ema', acc1, acc5, loss).
"""
import importlib.util
import json
import math
import os

from errors import UserError
from files import atomic_file

METRICS, CURVES, SCALARS = 'metrics.jsonl', 'curves.png', 'visualdl'
PANELS = [  # title, event, value, of both weights, logarithmic
    ('training loss', 'step', 'loss', False, False), ('top-1 accuracy, %', 'eval', 'acc1', True, False),
    ('validation loss', 'eval', 'loss', True, False), ('learning rate', 'step', 'lr', False, False),
    ('gradient norm', 'step', 'grad_norm', False, True), ('images per second', 'step', 'images_per_s', False, False),
    ('loss scale', 'step', 'loss_scale', False, True),
]
COLUMNS = 3


def read_metrics(folder):
    """The records of a run folder's metrics.jsonl, a list of dicts; a last line that was cut off is left out.

    Raises:
        FileNotFoundError, UserError: there is no such file, or it is something else.
    """
    path = os.path.join(folder, METRICS)
    try:
        with open(path, encoding='utf-8') as file:
            lines = file.read().split('\n')
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file; name the folder of a run') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {error}') from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f'{path}:{number}: is not a JSON object') from None
    return records


class VisualDL:
    """Writes the records of a run as VisualDL scalars, `event/value` over optimizer steps, into FOLDER/visualdl.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, folder):
        self.check()
        from visualdl import LogWriter
        self._writer = LogWriter(logdir=os.path.join(folder, SCALARS))

    @staticmethod
    def check():
        """Raises UserError where the package is not installed."""
        if importlib.util.find_spec('visualdl') is None:
            raise UserError('VISUALDL True: visualdl is not installed; pip install visualdl, or set VISUALDL False')

    def add(self, record):
        """Adds a record of metrics.jsonl; values that are not finite are left out."""
        event = '_'.join(filter(None, (record['event'], record.get('weights'))))
        for name, value in record.items():
            if name not in ('time', 'step') and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(tag=f'{event}/{name}', step=record['step'], value=value)
        if event != 'step':
            self._writer.flush()


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

    panels = [panel for panel in PANELS
              if any(r['event'] == panel[1] and r.get(panel[2]) for records in runs.values() for r in records)]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.4 * rows + 0.5), layout='constrained')
    for position, (title, event, value, both, logarithmic) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, position)
        for index, (folder, records) in enumerate(runs.items()):
            for weights, style in (('model', '-'), ('model_ema', '--')) if both else ((None, '-'),):
                points = [(r['epoch'], r[value]) for r in records
                          if r['event'] == event and r.get('weights') == weights and r.get(value) is not None]
                label = os.path.basename(os.path.normpath(folder)) + (' EMA' if weights == 'model_ema' else '')
                axes.plot(*zip(*points), style, color=f'C{index}', label=label, linewidth=1.4,
                          marker='.' if len(points) < 60 else None) if points else None
        axes.set_title(title, fontsize=11)
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yscale('log' if logarithmic else 'linear')
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        if both or len(runs) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(', '.join(os.path.basename(os.path.normpath(folder)) for folder in runs), fontsize=12)
    with atomic_file(path) as file:
        figure.savefig(file, format='png', dpi=110)


def curves_line(folder):
    """Draws FOLDER/curves.png; returns what the log says of it: a run that is done does not fail for its picture."""
    path = os.path.join(folder, CURVES)
    try:
        draw_curves([folder], path)
        return f'curves in {path}'
    except Exception as error:
        return f'no {CURVES}: {" ".join(str(error).split()) or type(error).__name__}'
