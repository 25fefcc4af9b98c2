"""Decides which folder a run is written to, and which checkpoint it resumes from."""
import glob
import os
import time

from config import config_changes
from errors import CheckpointError, UserError, why_unreadable
from run_folder.checkpoint import read_run_checkpoint
from run_folder.layout import CONFIG, LAST, LOG, OUTPUT, resumable_checkpoints, run_of
from run_folder.writer import RunFolder, lock_file
from utils import logger


def choose_folder(config):
    """Sets config.SAVE to the run folder, and config.MODEL.RESUME to what to resume, '' for a new run.

    The run folder is, in this order: that of -output; with -resume=auto the newest unfinished run in ./output with the
    same name and settings; the folder that -resume continues in place; a new one in ./output. A run that is already in
    it continues. An evaluation has a folder only with -output.

    Raises:
        UserError: the folder contains something else.
    """
    auto = config.MODEL.RESUME == 'auto'
    if auto:
        config.MODEL.RESUME = ''
    if not config.EVAL:
        config.SAVE = (config.SAVE or (auto and _newest_unfinished(config)) or run_of(config.MODEL.RESUME)
                       or os.path.join(OUTPUT, f'{config.MODEL.NAME}-{time.strftime("%Y%m%d-%H%M%S")}'))
        if not config.MODEL.RESUME and any(resumable_checkpoints(config.SAVE)):
            config.MODEL.RESUME = config.SAVE
    if config.SAVE:
        RunFolder(config)  # checks the folder


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
        with open(os.path.join(folder, LOG), 'a') as file:
            if not lock_file(file):
                return False
        return read_resumed(folder)[1]['epoch'] < config.TRAIN.NUM_EPOCHS
    except (OSError, UserError):
        return False
