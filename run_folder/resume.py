"""Decides which folder a run is written to, and which checkpoint it resumes from."""
import contextlib
import glob
import itertools
import os
import time

from config import config_changes
from errors import CheckpointError, UserError, why_unreadable
from run_folder.checkpoint import read_run_checkpoint
from run_folder.layout import CONFIG, LAST, OUTPUT, resumable_checkpoints, run_of
from run_folder.writer import RunFolder, is_at_work
from utils import logger

_created = []  # new run folders of this process


def choose_folder(config):
    """Sets config.SAVE to the run folder, and config.MODEL.RESUME to what to resume, '' for a new run.

    The run folder is, in this order: that of -output; with -resume=auto the newest unfinished run in ./output with the
    same name and settings; the folder that -resume continues in place; a new one in ./output. A run that is already in
    it continues. An evaluation has a folder only with -output.

    Of several processes that Paddle's launcher started, only rank 0 chooses; the others learn its choice when the
    run starts.

    Raises:
        UserError: the folder contains something else.
    """
    if os.environ.get('PADDLE_TRAINER_ID', '0') != '0':
        return
    auto = config.MODEL.RESUME == 'auto'
    if auto:
        config.MODEL.RESUME = ''
    if not config.EVAL:
        config.SAVE = (config.SAVE or (auto and _newest_unfinished(config)) or run_of(config.MODEL.RESUME)
                       or _new_folder(config))
        if not config.MODEL.RESUME and any(resumable_checkpoints(config.SAVE)):
            config.MODEL.RESUME = config.SAVE
    if config.SAVE:
        RunFolder(config)  # checks the folder


def _new_folder(config):
    """Path of a new folder in ./output; creating it keeps its name from runs that start in the same second."""
    path = os.path.join(OUTPUT, f'{config.MODEL.NAME}-{time.strftime("%Y%m%d-%H%M%S")}')
    for folder in itertools.chain([path], (f'{path}-{number}' for number in itertools.count(2))):
        try:
            if not config.DRY_RUN:
                os.makedirs(OUTPUT, exist_ok=True)
                os.mkdir(folder)
                _created.append(folder)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f'{folder}: cannot be created: {error.strerror}; name a folder with -output') from None


def remove_unused_folder():
    """Removes the folder that this process has created with `_new_folder`, if its run did not start."""
    for folder in _created:
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(folder)


def out_of_patience(config, epochs, best):
    """Whether training ends because the accuracy has not improved for TRAIN.PATIENCE epochs.

    Args:
        epochs: epochs done.
        best: entry 'best' of `checkpoint.SCHEMA`.
    """
    latest = max((metrics['epoch'] for metrics in best.values()), default=epochs)
    return bool(config.TRAIN.PATIENCE) and epochs - latest >= config.TRAIN.PATIENCE


def read_resumed(path):
    """Reads what `-resume=path` resumes from: a checkpoint, or the newest intact one of a run folder.

    Returns:
        (file, state), where state has the keys of `checkpoint.SCHEMA`.
    Raises:
        UserError, FileNotFoundError: there is no intact checkpoint.
    """
    folder = run_of(path)
    if folder is None:
        return path, read_run_checkpoint(path)
    problems = []
    for file in resumable_checkpoints(folder):
        try:
            state = read_run_checkpoint(file)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        if os.path.basename(file) != LAST:
            logger.info(f'{problems[0] if problems else f"no {LAST}"}: resuming from {file} instead')
        return file, state
    if problems:
        raise UserError(f'{problems[0]}; no intact checkpoint is left in {folder}')
    if os.path.exists(folder) and why_unreadable(folder):
        raise UserError(f'{folder}: cannot be read: {why_unreadable(folder)}')
    raise FileNotFoundError(f'{folder}: no {LAST} to resume from')


def _newest_unfinished(config):
    """The newest folder in ./output with an unfinished run of these settings that no process is working on, or None."""
    folders = glob.glob(os.path.join(OUTPUT, glob.escape(config.MODEL.NAME) + '-*'))
    return next((folder for folder in sorted(folders, reverse=True) if _is_unfinished(folder, config)), None)


def _is_unfinished(folder, config):
    try:
        with open(os.path.join(folder, CONFIG), encoding='utf-8') as file:
            if any(config_changes(file.read(), config)):
                return False
        if is_at_work(folder):
            return False
        state = read_resumed(folder)[1]
        return state['epoch'] < config.TRAIN.NUM_EPOCHS and not out_of_patience(config, state['epoch'], state['best'])
    except (OSError, UserError):
        return False
