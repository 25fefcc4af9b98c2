"""Writes a run folder: settings, logs, metrics and checkpoints. Only rank 0 does."""
import contextlib
import errno
import os
import time

import utils
from atomic_file import atomic_file, lock_file, remove_leftovers
from config import config_changes, config_text
from errors import UserError, why_unreadable
from image_files.folders import class_names
from image_files.lists import CLASSES
from run_folder.checkpoint import save_checkpoint
from run_folder.layout import (
    BEST,
    CONFIG,
    LAST,
    LOG,
    METRICS,
    NUMBERED,
    PREVIOUS,
    resumable_checkpoints,
    run_of,
)
from run_folder.scalars import Scalars, require_packages
from utils import logger

LOCK_SECONDS = 15  # how long to wait for the lock; by then the processes of a killed run have ended


def is_at_work(folder):
    """Whether another process is working on the run in a folder."""
    try:
        with open(os.path.join(folder, LOG), 'r+') as file:
            return not lock_file(file)
    except OSError:
        return False


class RunFolder:
    """Writes the files of one run; never overwrites those of another run.

    Creating it only checks the folder. `claim` creates the folder and must precede the methods that write.

    Args:
        config: frozen settings; `config.SAVE` is the folder.
    Attributes:
        own: whether a run continues in its own folder.
        saved_at: `time.monotonic()` of the last save.
        unsaved: why a checkpoint that has to be saved is not, '' if all are saved.
    Raises:
        UserError: the folder contains another run, or the path is a file.
    """

    def __init__(self, config):
        self.config, self.path = config, config.SAVE
        self.saved_at, self.unsaved = time.monotonic(), ''
        self._pending = {}  # checkpoints that could not be saved: {name: (state, key)}, the arguments of `_save`
        continued = '' if config.EVAL else run_of(config.MODEL.RESUME)
        self.own = bool(continued) and os.path.realpath(self.path) == os.path.realpath(continued)
        self._refuse_if_taken(live=is_at_work(self.path))  # not while this process has the lock, which it would lose
        self._scalars = None
        require_packages(config.SCALARS)

    def _refuse_if_taken(self, live):
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UserError(f'-output={self.path}: is a file; name a folder')
        reason = why_unreadable(self.path)
        if reason not in ('', os.strerror(errno.ENOENT)):
            raise UserError(f'-output={self.path}: cannot be used: {reason}; name another folder')
        if self.own or self._started_without_checkpoint():
            return
        found = [name for name in (CONFIG, LAST, *BEST.values()) if os.path.exists(os.path.join(self.path, name))]
        if found:
            hint = ('; another process is working on it' if live else '') + '; choose another folder'
            if not live and any(resumable_checkpoints(self.path)):
                hint += f', or continue that run with -resume={self.path}'
            raise UserError(f'-output={self.path}: already contains a run ({found[0]}){hint}')

    def _started_without_checkpoint(self):
        """Whether a run with these settings stopped here before its first checkpoint, so that it may start again."""
        try:
            with open(os.path.join(self.path, CONFIG), encoding='utf-8') as file:
                if self.config.EVAL or any(config_changes(file.read(), self.config)):
                    return False
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self.path, METRICS), 'rb') as file:
                if b'"epoch"' not in (file.readline() or b'"epoch"'):  # an evaluation, not training
                    return False
        except FileNotFoundError:
            return False
        return not any(resumable_checkpoints(self.path))

    def lock(self):
        """Keeps other processes from continuing the same run until this process has ended.

        Raises:
            UserError: another process has the lock, or the folder cannot be written.
        """
        try:
            self._held = open(os.path.join(self.path, LOG), 'a')
        except OSError as error:
            raise UserError(f'-output={self.path}: cannot be written: {error.strerror}; name another folder') from None
        deadline = time.monotonic() + LOCK_SECONDS
        while not lock_file(self._held):
            if time.monotonic() > deadline:
                raise UserError(f'-output={self.path}: another process is already working on this run')
            time.sleep(0.2)

    def claim(self, metrics_bytes=0):
        """Creates the folder and writes the settings into it; call this when everything is ready to start.

        Args:
            metrics_bytes: size to which metrics.jsonl is cut back: that at the checkpoint that the run resumes from.
        Raises:
            UserError: another run has the folder, or it cannot be written.
        """
        config_file = os.path.join(self.path, CONFIG)
        try:
            os.makedirs(self.path, exist_ok=True)
            if not self.own:
                self.lock()
                self._refuse_if_taken(live=False)  # of two runs that start at the same time, only one gets the folder
            remove_leftovers(self.path)
            utils.truncate_lines(os.path.join(self.path, METRICS), metrics_bytes)
            with atomic_file(config_file) as file:
                file.write(config_text(self.config).encode())
            data = self.config.DATA
            names = class_names(data.DATA_PATH, data.DATASET, self.config.MODEL.NUM_CLASSES)
            if names:
                with atomic_file(os.path.join(self.path, CLASSES)) as file:
                    file.write(''.join(f'{name}\n' for name in names).encode())
            utils.log_to_file(os.path.join(self.path, LOG))
            if self.config.SCALARS and not self.config.EVAL:
                self._scalars = Scalars(self.path, self.config.SCALARS)
        except OSError as error:
            raise UserError(f'-output={self.path}: cannot be written: {error.strerror}; name another folder') from None
        logger.info(f'run folder {self.path}')

    def record(self, **values):
        """Adds a record to metrics.jsonl and to the scalars; see run_folder/metrics.py for its keys."""
        path, record = os.path.join(self.path, METRICS), {'time': round(time.time(), 3), **values}
        try:
            utils.append_json_line(path, record)
        except OSError as error:
            logger.error(f'{path}: a line is lost: {error.strerror}')
        if self._scalars is not None:
            self._scalars.add(record)

    def save_last(self, state):
        """Saves the last checkpoint and keeps the one before as the previous one; first retries failed saves."""
        for name, (pending, key) in list(self._pending.items()):
            self._save(pending, name, key)
        self._save(state, LAST, keep_old_as=PREVIOUS)
        self.saved_at = time.monotonic()

    def save_evaluated(self, state, accuracies, improved):
        """Saves the results of an epoch: best weights, the numbered checkpoint, and then the last checkpoint.

        The last checkpoint is written only after all others are saved. If the run stops before that, it repeats the
        evaluation and these saves when it is resumed.

        Args:
            state: as in `checkpoint.SCHEMA`; its entry 'numbered' is updated in place.
            accuracies: {'model' or 'model_ema': top-1 accuracy or mAP in percent} after this epoch, {} if not
                evaluated.
            improved: keys of `accuracies` that are the best so far.
        """
        for key in improved:
            self._save({'epoch': state['epoch'], 'best': state['best'], 'config': state['config'], key: state[key]},
                       BEST[key], key)
        self._save_numbered(state, accuracies)
        if not self._pending:
            self.save_last(state)

    def _save_numbered(self, state, accuracies):
        """Saves the numbered checkpoint of this epoch if it is to be kept, and deletes those that are not any more."""
        numbered, epoch = state['numbered'], state['epoch']
        name = NUMBERED.format(epoch)
        key = max(accuracies, key=accuracies.get, default='model')
        numbered[name] = {'epoch': epoch, 'acc1': accuracies.get(key), 'weights': key}
        kept = numbered_to_keep(numbered, self.config.SAVE_FREQ, self.config.SAVE_LATEST_K, self.config.SAVE_TOP_K)
        dropped = set(numbered) - set(kept)
        for n in dropped:  # before saving, so that a resumed run that repeats this saves the same, with files gone
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
        """Writes a checkpoint; `key`, 'model' or 'model_ema', becomes its `weights_key`.

        A full disk does not end the run: the checkpoint before stays intact. The next `save_last` tries again, except
        for the last checkpoint, which it replaces anyway.
        """
        path = os.path.join(self.path, name)
        try:
            save_checkpoint(path, {**state, 'weights_key': key, 'metrics_bytes': self._size(METRICS)}, keep_old_as)
            self._pending.pop(name, None)
            self.unsaved = '' if not self._pending else self.unsaved
        except OSError as error:
            self.unsaved = f'{path}: not saved: {error.strerror}'
            logger.error(f'{self.unsaved}; training continues, and the last good checkpoint is kept')
            if name != LAST:
                self._pending[name] = (state, key)

    def summary(self, best, numbered):
        """Logs the best accuracies and the numbered checkpoints, with their files."""
        for key, metrics in best.items():
            path = os.path.join(self.path, BEST[key])
            where = f'in {path}' if os.path.exists(path) else 'in the folder of the run it was resumed from'
            if BEST[key] in self._pending:
                where = f'(not saved: {path} has an earlier epoch)' if os.path.exists(path) else '(not saved)'
            accuracy = ' '.join(f'{label} {metrics[name]:.3f}' for label, name in (
                ('Acc@1', 'acc1'), ('Acc@5', 'acc5'), ('mAP', 'mAP')) if name in metrics)
            logger.info(f"best {'EMA' if key == 'model_ema' else 'model'}: epoch {metrics['epoch']} {accuracy} {where}")
        for name in numbered_to_keep(numbered, every=1):
            entry = numbered[name]
            metric = 'mAP' if self.config.DATA.MULTI_LABEL else 'Acc@1'
            accuracy = 'not evaluated' if entry['acc1'] is None else (
                f"{metric} {entry['acc1']:.3f} ({'EMA' if entry['weights'] == 'model_ema' else 'model'})")
            state = 'not saved' if name in self._pending else 'kept'
            logger.info(f'{state}: {os.path.join(self.path, name)} {accuracy}')
        logger.info(f'run folder {self.path}')


def numbered_to_keep(numbered, every=0, latest=0, top=0):
    """Names of the numbered checkpoints to keep, most accurate first.

    Args:
        numbered: {name: {'epoch', 'acc1'}}, with None for an accuracy that was not measured.
        every: keep those whose epoch is a multiple of it; 0: none.
        latest: keep those of this many latest epochs.
        top: keep this many of the most accurate ones.
    """
    ranked = sorted(numbered, reverse=True, key=lambda n: (
        -1 if numbered[n]['acc1'] is None else numbered[n]['acc1'], numbered[n]['epoch']))
    newest = max((entry['epoch'] for entry in numbered.values()), default=0)
    measured = [n for n in ranked if numbered[n]['acc1'] is not None]
    return [n for n in ranked if (every and numbered[n]['epoch'] % every == 0)
            or numbered[n]['epoch'] > newest - latest or n in measured[:top]]
