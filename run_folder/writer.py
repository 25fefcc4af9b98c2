"""Writes the folder of a run: its settings, logs and checkpoints. Only rank 0 has one."""
import contextlib
import errno
import glob
import os
import shutil
import time

import utils
from atomic_file import atomic_file, remove_leftovers
from config import config_changes, config_text
from errors import CheckpointError, UserError
from run_folder.checkpoint import read_run_checkpoint, save_checkpoint
from run_folder.layout import BEST, CLASSES, CONFIG, LAST, LOG, NUMBERED, PREVIOUS, find_classes, run_of
from run_folder.metrics import METRICS, VisualDL
from utils import logger

try:
    import fcntl
except ImportError:  # not on Windows: nothing keeps a second process out there
    fcntl = None
LOCK_SECONDS = 15  # the processes of a run that was killed are gone by then


def _checkpoints(folder):
    """Checkpoints that a run can be resumed from, newest first, that may be there."""
    numbered = sorted(glob.glob(os.path.join(glob.escape(folder), 'epoch_*.pdparams')), reverse=True)
    return [os.path.join(folder, LAST), os.path.join(folder, PREVIOUS), *numbered]


def read_resumed(path):
    """What `-resume=path` continues from: a checkpoint, or of a run folder the newest one that is whole.

    Returns:
        (file, state)
    Raises:
        UserError, FileNotFoundError: there is none.
    """
    folder = run_of(path)
    if folder is None:
        return path, read_run_checkpoint(path)
    problems = []
    for file in _checkpoints(folder):
        if os.path.exists(file):
            try:
                state = read_run_checkpoint(file)
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
                continue
            if os.path.basename(file) != LAST:
                logger.info(f'{problems[0] if problems else f"no {LAST}"}: stepping back to {file}')
            return file, state
    if problems:
        raise UserError(f'{problems[0]}; no whole checkpoint is left in {folder}')
    raise FileNotFoundError(f'{folder}: no {LAST} to resume from')


def choose_folder(config):
    """Decides where a run goes and what it continues; sets SAVE and MODEL.RESUME.

    With -output, a run that is there goes on; with -resume=auto and no -output, the newest unfinished one in ./output
    of the same name and settings does.
    Raises:
        UserError: the folder holds something else.
    """
    resume = config.MODEL.RESUME
    if resume == 'auto':
        config.MODEL.RESUME = ''
    if config.EVAL:
        if config.SAVE:
            RunFolder(config)
        return
    if resume == 'auto' and not config.SAVE:
        for folder in sorted(glob.glob(os.path.join('output', glob.escape(config.MODEL.NAME) + '-*')), reverse=True):
            if _unfinished(folder, config):
                config.SAVE = folder
                break
    if not config.SAVE:
        fresh = os.path.join('output', f'{config.MODEL.NAME}-{time.strftime("%Y%m%d-%H%M%S")}')
        config.SAVE = run_of(resume) or fresh if resume != 'auto' else fresh
    if not config.MODEL.RESUME and any(map(os.path.exists, _checkpoints(config.SAVE))):
        config.MODEL.RESUME = config.SAVE
    RunFolder(config)


def _unfinished(folder, config):
    """Whether an unfinished run of these settings lies there that no process works at."""
    try:
        with open(os.path.join(folder, CONFIG), encoding='utf-8') as file:
            if any(config_changes(file.read(), config)):
                return False
        with open(os.path.join(folder, LOG), 'a') as file:
            if not _lock(file):
                return False
        return read_resumed(folder)[1]['epoch'] < config.TRAIN.NUM_EPOCHS
    except (OSError, UserError):
        return False


def _lock(file):
    """Claims a file for this process, until it ends or closes the file; False where another one has it."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # others: the file system has no locks
    return True


class RunFolder:
    """Writes what a run leaves behind; never over another run's.

    Args:
        config: frozen settings; `config.SAVE` is the folder.
    Attributes:
        saved_at: `time.monotonic()` of the last save.
        unsaved: why something could not be saved that still has to be, '' when all is.
    Raises:
        UserError: the folder holds another run or cannot be made.
    """

    def __init__(self, config):
        self.config, self.path = config, config.SAVE
        self.saved_at, self.unsaved, self._owed = time.monotonic(), '', {}
        continued = '' if config.EVAL else run_of(config.MODEL.RESUME)
        self.own = bool(continued) and os.path.realpath(self.path) == os.path.realpath(continued)
        self._refuse_if_taken()
        self._scalars = None
        if config.VISUALDL:
            VisualDL.check()

    def _refuse_if_taken(self):
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UserError(f'-output={self.path}: is a file; name a folder')
        if self.own or self._begun_without_checkpoint():
            return
        held = [name for name in (CONFIG, LAST, *BEST.values()) if os.path.exists(os.path.join(self.path, name))]
        if held:
            hint = (f'continue that run with -resume={self.path}' if os.path.exists(os.path.join(self.path, LAST)) else
                    'delete it: it has no checkpoint')
            raise UserError(f'-output={self.path}: holds a run already ({held[0]}); choose another folder, or {hint}')

    def _begun_without_checkpoint(self):
        """Whether a run of these settings ended there before its first checkpoint; it begins anew."""
        try:
            with open(os.path.join(self.path, CONFIG), encoding='utf-8') as file:
                if self.config.EVAL or any(config_changes(file.read(), self.config)):
                    return False
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self.path, METRICS), 'rb') as file:
                if b'"epoch"' not in (file.readline() or b'"epoch"'):  # the folder of an evaluation
                    return False
        except FileNotFoundError:
            return False
        return not any(map(os.path.exists, _checkpoints(self.path)))

    def lock(self):
        """Keeps other processes from continuing the same run until this one ends, in whatever way."""
        try:
            self._held = open(os.path.join(self.path, LOG), 'a')
        except OSError as error:
            raise UserError(f'-output={self.path}: cannot be written: {error.strerror}') from None
        deadline = time.monotonic() + LOCK_SECONDS
        while not _lock(self._held):
            if time.monotonic() > deadline:
                raise UserError(f'-output={self.path}: another process is at work on this run')
            time.sleep(0.2)

    def claim(self, metrics_bytes=0):
        """Makes the folder this run's and writes the settings; call when everything is ready to start.

        Args:
            metrics_bytes: how much of metrics.jsonl a run that goes on in its folder keeps.
        """
        config_file = os.path.join(self.path, CONFIG)
        try:
            os.makedirs(self.path, exist_ok=True)
            if not self.own:
                self.lock()
                self._refuse_if_taken()  # of two runs that start at once, one gets the folder
            remove_leftovers(self.path)
            utils.truncate_lines(os.path.join(self.path, METRICS), metrics_bytes)
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
        path = os.path.join(self.path, METRICS)
        try:
            utils.append_json_line(path, {'time': round(time.time(), 3), **values})
        except OSError as error:
            logger.error(f'{path}: a line is lost: {error.strerror}')
        if self._scalars is not None:
            self._scalars.add(values)

    def save_last(self, state):
        """Saves the state to resume from, after what could not be saved before; the one before stays as previous."""
        for name, (owed, key) in list(self._owed.items()):
            self._save(owed, name, key)
        self._save(state, LAST, keep_old_as=PREVIOUS)
        self.saved_at = time.monotonic()

    def save_evaluated(self, state, accuracies, improved):
        """Saves what an epoch changed: the best weights of each in `improved`, a numbered checkpoint, and `last`.

        `last` comes last, and only when the others are saved: a run that ends before evaluates and saves again.

        Args:
            state: with the numbered checkpoints so far under 'numbered', which is brought up to date.
            accuracies: {'model' or 'model_ema': percent} of this epoch, {} where it was not measured.
            improved: which of them are the best so far.
        """
        for key in improved:
            self._save({'epoch': state['epoch'], 'best': state['best'], 'config': state['config'], key: state[key]},
                       BEST[key], key)
        self._save_numbered(state, accuracies)
        if not self._owed:
            self.save_last(state)

    def _save_numbered(self, state, accuracies):
        numbered, epoch = state['numbered'], state['epoch']
        name = NUMBERED.format(epoch)
        key = max(accuracies, key=accuracies.get, default='model')
        numbered[name] = {'epoch': epoch, 'acc1': accuracies.get(key), 'weights': key}
        kept = numbered_to_keep(numbered, self.config.SAVE_FREQ, self.config.SAVE_LATEST_K, self.config.SAVE_TOP_K)
        dropped = set(numbered) - set(kept)
        for n in dropped:  # before it is saved: the same comes out where files are gone already, as after a stop here
            del numbered[n]
        if name in kept:
            self._save(state, name, key)
        sizes = {n: self._size(n) for n in kept}
        spare = self.config.SAVE_MAX_GB * 1e9 - 2 * self._size(LAST) - sum(map(self._size, BEST.values()))
        while self.config.SAVE_MAX_GB and kept and sum(sizes[n] for n in kept) > spare:
            del numbered[kept[-1]]
            dropped.add(kept.pop())
        for n in dropped:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(self.path, n))

    def _size(self, name):
        try:
            return os.path.getsize(os.path.join(self.path, name))
        except FileNotFoundError:
            return 0

    def _save(self, state, name, key='model', keep_old_as=None):
        """Writes a checkpoint in which `key` ('model' or 'model_ema') stands for the weights.

        A disk that is full costs the run this checkpoint, not its life: the one before is still whole, and all but
        `last`, which the next one replaces, is tried again with that.
        """
        path = os.path.join(self.path, name)
        try:
            save_checkpoint(path, {**state, 'weights_key': key, 'metrics_bytes': self._size(METRICS)}, keep_old_as)
            self._owed.pop(name, None)
            self.unsaved = '' if not self._owed else self.unsaved
        except OSError as error:
            self.unsaved = f'{path}: not saved: {error.strerror}'
            logger.error(f'{self.unsaved}; training goes on, the last good checkpoint stays')
            if name != LAST:
                self._owed[name] = (state, key)

    def summary(self, best, numbered):
        """Logs the best accuracies and the numbered checkpoints, and how to see them again."""
        for key, metrics in best.items():
            path = os.path.join(self.path, BEST[key])
            where = f'in {path}' if os.path.exists(path) else 'in the folder of the run it was resumed from'
            logger.info(f"best {'EMA' if key == 'model_ema' else 'model'}: epoch {metrics['epoch']} "
                        f"Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} {where}")
        for name in numbered_to_keep(numbered, every=1):
            entry = numbered[name]
            accuracy = 'not evaluated' if entry['acc1'] is None else (
                f"Acc@1 {entry['acc1']:.3f} ({'EMA' if entry['weights'] == 'model_ema' else 'model'})")
            logger.info(f'kept: {os.path.join(self.path, name)} {accuracy}')
        logger.info(f'run folder {self.path}')


def numbered_to_keep(numbered, every=0, latest=0, top=0):
    """Which numbered checkpoints stay, the most accurate first.

    Args:
        numbered: {name: {'epoch', 'acc1' (None where it was not measured)}}.
        every: those of every so many epochs; `latest`: of so many last epochs; `top`: the most accurate ones; 0: none.
    """
    ranked = sorted(numbered, reverse=True, key=lambda n: (
        -1 if numbered[n]['acc1'] is None else numbered[n]['acc1'], numbered[n]['epoch']))
    newest = max((entry['epoch'] for entry in numbered.values()), default=0)
    measured = [n for n in ranked if numbered[n]['acc1'] is not None]
    return [n for n in ranked if (every and numbered[n]['epoch'] % every == 0)
            or numbered[n]['epoch'] > newest - latest or n in measured[:top]]
