"""Metrics of a run: reads metrics.jsonl and finds the best checkpoint from it.

Each line of metrics.jsonl is a JSON object with `event`, `time` (Unix time in seconds), `epoch` and `step` (optimizer
steps done so far). The other keys depend on the event:

    step    every REPORT_FREQ steps, `epoch` being a fraction: loss, lr, grad_norm, images_per_s, loss_scale (with AMP)
    train   after each epoch: processes, and what `training.engine.train_one_epoch` returns
    eval    after each evaluation: weights ('model' or 'model_ema'), acc1, acc5, loss, images (with DATA.MULTI_LABEL
            mAP, classes, loss, images); after -eval without weights, epoch and step
    data    when a run is resumed with other data (DATA.ALLOW_CHANGES): changed, a list of 'train', 'val', 'classes'
"""
import json
import os

from errors import UserError
from run_folder.layout import BEST, LAST, METRICS


def read_metrics(folder):
    """The records of a run folder's metrics.jsonl as a list of dicts; an incomplete last line is ignored.

    Raises:
        FileNotFoundError: the folder has no metrics.jsonl.
        UserError: the file cannot be read, or a line is not JSON.
    """
    path = os.path.join(folder, METRICS)
    try:
        with open(path, encoding='utf-8') as file:
            lines = file.read().split('\n')
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file; give the folder of a run') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {error}') from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f'{path}:{number}: is not a JSON object') from None
    return records


def main_metric(metrics):
    """(name, value in percent) of what decides which of several evaluations is best."""
    return ('mAP', metrics['mAP']) if 'mAP' in metrics else ('Acc@1', metrics['acc1'])


def best_checkpoint(folder):
    """The checkpoint of a run folder with the best evaluated accuracy or mAP, or its last one if nothing was evaluated.

    Raises:
        UserError: the folder has no checkpoint.
    """
    accuracy = {}
    if os.path.isfile(os.path.join(folder, METRICS)):
        for record in read_metrics(folder):
            if record['event'] == 'data' and 'val' in record['changed']:
                accuracy.clear()  # measured on other images
            elif record['event'] == 'eval' and record.get('weights') in BEST:
                name = BEST[record['weights']]
                accuracy[name] = max(main_metric(record)[1], accuracy.get(name, 0))
    for name in (*sorted(accuracy, key=accuracy.get, reverse=True), *BEST.values(), LAST):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UserError(f'{folder}: no checkpoint; a run folder has {", ".join([*BEST.values(), LAST])}')
