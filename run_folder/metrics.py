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

METRICS = 'metrics.jsonl'
SCALARS = 'visualdl'


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
