"""The folder of a run: its settings, logs and checkpoints. Only rank 0 has one."""
import contextlib
import os
import time

import utils
from checkpoint import save_checkpoint
from config import config_text
from errors import UserError
from files import atomic_file
from utils import logger

LAST = 'last.pdparams'
BEST = {'model': 'best.pdparams', 'model_ema': 'best_ema.pdparams'}  # by the weights whose accuracy is the best
CONFIG, LOG, METRICS = 'config.yaml', 'log.txt', 'metrics.jsonl'


def resolve_resume(path):
    """The checkpoint file for `-resume`: a file, or a run folder for its last one."""
    return os.path.join(path, LAST) if os.path.isdir(path) else path


def config_beside(path):
    """The settings file that lies beside a checkpoint of a run, or None."""
    found = os.path.join(os.path.dirname(resolve_resume(path)), CONFIG)
    return found if os.path.isfile(found) else None


def default_folder(config):
    """Where a run goes without `-output`: the folder of the run it resumes, or a new one named by the time."""
    if config.MODEL.RESUME:
        return os.path.dirname(os.path.abspath(resolve_resume(config.MODEL.RESUME)))
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
        resumed = config.MODEL.RESUME and os.path.dirname(os.path.abspath(resolve_resume(config.MODEL.RESUME)))
        self.own = bool(resumed) and os.path.realpath(resumed) == os.path.realpath(self.path)
        self._refuse_if_taken()

    def _refuse_if_taken(self):
        held = [name for name in (CONFIG, LAST, LOG, *BEST.values()) if os.path.exists(os.path.join(self.path, name))]
        if held and not self.own:
            raise UserError(f'-output={self.path}: holds a run already ({held[0]}); choose another folder, '
                            f'or continue that run with -resume={os.path.join(self.path, LAST)}')

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
            utils.log_to_file(os.path.join(self.path, LOG))
        except OSError as error:
            raise UserError(f'-output={self.path}: cannot be written: {error.strerror}') from None
        logger.info(f'run folder {self.path}')

    def record(self, **values):
        """Adds a line to metrics.jsonl."""
        utils.append_json_line(os.path.join(self.path, METRICS), {'time': round(time.time(), 3), **values})

    def save(self, state, epoch, improved):
        """Writes last, each best in `improved` ('model', 'model_ema') and, every SAVE_FREQ epochs, a numbered one.

        A disk that is full costs the run this checkpoint, not its life: the one before is still whole.
        """
        files = [(LAST, 'model')] + [(BEST[key], key) for key in improved]
        if self.config.SAVE_FREQ and epoch % self.config.SAVE_FREQ == 0:
            files.append((f'epoch_{epoch:04d}.pdparams', 'model'))
        for name, key in files:
            try:
                save_checkpoint(os.path.join(self.path, name), {**state, 'weights_key': key})
            except OSError as error:
                logger.error(f'{os.path.join(self.path, name)}: not saved: {error.strerror}; training goes on, '
                             'the file that was there stays')

    def summary(self, best):
        """Logs the best accuracies and how to see them again."""
        for key, metrics in best.items():
            logger.info(f"best {'EMA' if key == 'model_ema' else 'model'}: epoch {metrics['epoch']} "
                        f"Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} "
                        f"in {os.path.join(self.path, BEST[key])}")
        logger.info(f'run folder {self.path}')
