"""Names of the files in a run folder, and how to find them. Needs neither Paddle nor the code that writes them."""
import glob
import os

OUTPUT = 'output'  # parent of the run folders that get a name of NAME-TIME
CONFIG = 'config.yaml'  # settings of the run, a file for -cfg
LOG = 'log.txt'  # log lines; the process that trains holds a lock on this file
METRICS = 'metrics.jsonl'  # see run_folder/metrics.py; run_folder/scalars.py has the folders with copies
CURVES = 'curves.png'  # see run_folder/curves.py; classes.txt has its name in image_files/lists.py
LAST, PREVIOUS = 'last.pdparams', 'previous.pdparams'  # the newest checkpoint to resume from, and the one before it
NUMBERED, NUMBERED_GLOB = 'epoch_{:04d}.pdparams', 'epoch_*.pdparams'  # checkpoints of epochs, also to resume from
BEST = {'model': 'best.pdparams', 'model_ema': 'best_ema.pdparams'}  # only the weights, with the best accuracy


def run_of(path):
    """The run folder that `-resume=path` continues in place: `path` itself, or the folder of a last checkpoint.

    Returns None for other checkpoints, whose run continues in a new folder.
    """
    if os.path.isdir(path):
        return path
    return (os.path.dirname(path) or '.') if os.path.basename(path) == LAST else None


def resumable_checkpoints(folder):
    """Iterates over the existing checkpoints that a run can be resumed from, newest first."""
    numbered = sorted(glob.glob(os.path.join(glob.escape(folder), NUMBERED_GLOB)), reverse=True)
    return filter(os.path.exists, (os.path.join(folder, LAST), os.path.join(folder, PREVIOUS), *numbered))


def config_beside(path):
    """The settings file of the run folder `path`, or of the folder that contains the checkpoint `path`; or None."""
    found = os.path.join(run_of(path) or os.path.dirname(path), CONFIG)
    return found if os.path.isfile(found) else None
