"""The folder of a run: its settings, logs and checkpoints. Only rank 0 has one."""
import contextlib
import json
import os
import shutil
import time

import utils
from checkpoint import save_checkpoint
from config import config_text
from errors import UserError
from files import atomic_file
from monitor import METRICS, VisualDL
from utils import logger

LAST = 'last.pdparams'
BEST = {'model': 'best.pdparams', 'model_ema': 'best_ema.pdparams'}  # by the weights whose accuracy is the best
CONFIG, LOG = 'config.yaml', 'log.txt'
CLASSES = 'classes.txt'  # the data folder's, where it has one


def resolve_resume(path):
    """The checkpoint file for `-resume`: a file, or a run folder for its last one."""
    return os.path.join(path, LAST) if os.path.isdir(path) else path


def config_beside(path):
    """The settings file that lies beside a checkpoint of a run, or None."""
    found = os.path.join(os.path.dirname(resolve_resume(path)), CONFIG)
    return found if os.path.isfile(found) else None


def best_checkpoint(folder):
    """The checkpoint of a run folder whose evaluation was the best, its last one where there was none.

    Raises:
        UserError: the folder holds no checkpoint.
    """
    accuracy, metrics = {}, os.path.join(folder, METRICS)
    if os.path.isfile(metrics):
        with open(metrics, encoding='utf-8') as file:
            for record in map(json.loads, file):
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


def _continued(config):
    """Whether this is a run that goes on in the folder of the one it resumes: from its last checkpoint."""
    return not config.EVAL and os.path.basename(resolve_resume(config.MODEL.RESUME)) == LAST


def default_folder(config):
    """Where a run goes without `-output`: on in the folder of the run it continues, or to a new one named by time."""
    if _continued(config):
        return os.path.dirname(resolve_resume(config.MODEL.RESUME)) or '.'
    return os.path.join('output', f'{config.MODEL.NAME}-{time.strftime("%Y%m%d-%H%M%S")}')


class RunFolder:
    """Writes what a run leaves behind; never over another run's.

    Args:
        config: frozen settings; `config.SAVE` is the folder.
    Raises:
        UserError: the folder holds another run or cannot be made.
    """

    def __init__(self, config):
        self.config, self.path = config, config.SAVE
        self.own = _continued(config) and os.path.realpath(self.path) == os.path.realpath(
            os.path.dirname(resolve_resume(config.MODEL.RESUME)))
        self._refuse_if_taken()
        self._scalars = None
        if config.VISUALDL:
            VisualDL.check()

    def _refuse_if_taken(self):
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UserError(f'-output={self.path}: is a file; name a folder')
        held = [name for name in (CONFIG, LAST, LOG, *BEST.values()) if os.path.exists(os.path.join(self.path, name))]
        if held and not self.own:
            last = os.path.join(self.path, LAST)
            hint = (f'continue that run with -resume={last}' if os.path.exists(last) else
                    'delete it: it has no checkpoint')
            raise UserError(f'-output={self.path}: holds a run already ({held[0]}); choose another folder, or {hint}')

    def claim(self):
        """Makes the folder this run's and writes the settings; call when everything is ready to start."""
        config_file = os.path.join(self.path, CONFIG)
        try:
            os.makedirs(self.path, exist_ok=True)
            if not self.own:
                with contextlib.suppress(FileExistsError):  # of two runs that start at once, one gets the folder
                    os.close(os.open(config_file, os.O_CREAT | os.O_EXCL))
                    self.own = True
                self._refuse_if_taken()
            with atomic_file(config_file) as file:
                file.write(config_text(self.config).encode())
            classes = find_classes(self.config.DATA.DATA_PATH)
            if classes and not find_classes(self.path):
                shutil.copyfile(classes, os.path.join(self.path, CLASSES))
            utils.log_to_file(os.path.join(self.path, LOG))
        except OSError as error:
            raise UserError(f'-output={self.path}: cannot be written: {error.strerror}') from None
        if self.config.VISUALDL and not self.config.EVAL:
            self._scalars = VisualDL(self.path)
        logger.info(f'run folder {self.path}')

    def record(self, **values):
        """Adds a line to metrics.jsonl, and its numbers to VisualDL: see monitor.py."""
        utils.append_json_line(os.path.join(self.path, METRICS), {'time': round(time.time(), 3), **values})
        if self._scalars is not None:
            self._scalars.add(values)

    def save(self, state, name=LAST, key='model'):
        """Writes a checkpoint in which `key` ('model' or 'model_ema') stands for the weights.

        A disk that is full costs the run this checkpoint, not its life: the one before is still whole.
        """
        path = os.path.join(self.path, name)
        try:
            save_checkpoint(path, {**state, 'weights_key': key})
        except OSError as error:
            logger.error(f'{path}: not saved: {error.strerror}; training goes on, the file that was there stays')

    def save_evaluated(self, state, epoch, improved):
        """Writes what an evaluation changed: the best of each in `improved`, `last`, and a numbered checkpoint."""
        for key in improved:
            self.save(state, BEST[key], key)
        if improved:
            self.save(state)
        if self.config.SAVE_FREQ and epoch % self.config.SAVE_FREQ == 0:
            self.save(state, f'epoch_{epoch:04d}.pdparams')

    def summary(self, best):
        """Logs the best accuracies and how to see them again."""
        for key, metrics in best.items():
            path = os.path.join(self.path, BEST[key])
            where = f'in {path}' if os.path.exists(path) else 'in the folder of the run it was resumed from'
            logger.info(f"best {'EMA' if key == 'model_ema' else 'model'}: epoch {metrics['epoch']} "
                        f"Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} {where}")
        logger.info(f'run folder {self.path}')
