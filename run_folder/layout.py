"""Names of the files in a run folder, and what can be found there without Paddle."""
import os

from errors import UserError
from run_folder.metrics import METRICS, read_metrics

LAST, PREVIOUS = 'last.pdparams', 'previous.pdparams'
BEST = {'model': 'best.pdparams', 'model_ema': 'best_ema.pdparams'}  # weights only, of the best accuracy
NUMBERED = 'epoch_{:04d}.pdparams'
CONFIG, LOG = 'config.yaml', 'log.txt'
CLASSES = 'classes.txt'  # the data folder's, where it has one


def run_of(path):
    """The run folder that `-resume=path` continues in place, or None: the folder itself, or its last checkpoint."""
    if os.path.isdir(path):
        return path
    return (os.path.dirname(path) or '.') if os.path.basename(path) == LAST else None


def config_beside(path):
    """The settings file that lies beside a checkpoint of a run, or None."""
    found = os.path.join(run_of(path) or os.path.dirname(path), CONFIG)
    return found if os.path.isfile(found) else None


def best_checkpoint(folder):
    """The checkpoint of a run folder whose evaluation was the best, its last one where there was none.

    Raises:
        UserError: the folder holds no checkpoint.
    """
    accuracy = {}
    if os.path.isfile(os.path.join(folder, METRICS)):
        for record in read_metrics(folder):
            if record['event'] == 'eval' and record.get('weights') in BEST:
                name = BEST[record['weights']]
                accuracy[name] = max(record['acc1'], accuracy.get(name, 0))
    for name in (*sorted(accuracy, key=accuracy.get, reverse=True), *BEST.values(), LAST):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UserError(f'{folder}: no checkpoint; a run folder holds {", ".join([*BEST.values(), LAST])}')


def find_classes(*folders):
    """The first file with the names of the classes that there is in the folders, or None."""
    found = (os.path.join(folder, CLASSES) for folder in folders if folder)
    return next(filter(os.path.isfile, found), None)
