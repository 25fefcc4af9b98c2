"""Copies the numbers of metrics.jsonl to event files for VisualDL and TensorBoard."""
import contextlib
import glob
import importlib.util
import math
import os

from errors import UserError
from run_folder.metrics import read_metrics
from utils import logger


class _VisualDL:
    package, files = 'visualdl', 'vdlrecords.*.log'

    def __init__(self, folder):
        from visualdl import LogWriter
        self._writer = LogWriter(logdir=folder)
        self.flush = self._writer.flush

    def add(self, tag, value, step, time):
        self._writer.add_scalar(tag=tag, value=value, step=step, walltime=round(1000 * time))


class _TensorBoard:
    """Writes in the calling thread.

    On a full disk the thread of tensorboardX.SummaryWriter ends, and add_scalar would wait for it forever.
    """
    package, files = 'tensorboardX', 'events.out.tfevents.*'

    def __init__(self, folder):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        os.makedirs(folder, exist_ok=True)
        self._event, self._scalar, self._writer = Event, summary.scalar, EventsWriter(os.path.join(folder, 'events'))
        self.flush = self._writer.flush
        # as with SummaryWriter(purge_step=0), a TensorBoard that has read earlier files discards what it knows
        self._writer.write_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))

    def add(self, tag, value, step, time):
        self._writer.write_event(self._event(wall_time=time, step=step, summary=self._scalar(tag, value)))


WRITERS = {'visualdl': _VisualDL, 'tensorboard': _TensorBoard}  # names are those of the folders in a run folder


def kinds(setting):
    """The keys of `WRITERS` for a value of the key SCALARS."""
    return tuple(WRITERS) if setting == 'both' else (setting,) if setting else ()


def require_packages(setting):
    """Raises UserError if a package is not installed that the value `setting` of the key SCALARS needs."""
    for kind in kinds(setting):
        package = WRITERS[kind].package
        if importlib.util.find_spec(package) is None:
            raise UserError(f'SCALARS {setting}: {package} is not installed; pip install {package}, or change SCALARS')


class Scalars:
    """Writes the records of a run as scalars named `event/value` over optimizer steps.

    The files of an earlier start of the run are replaced by new ones with the records that metrics.jsonl has. A
    resumed run thus has every step once, whatever was written after its checkpoint.

    Args:
        folder: the run folder.
        setting: value of the key SCALARS, which is not empty.
    Raises:
        OSError: the files cannot be written.
        UserError: see `read_metrics`.
    """

    def __init__(self, folder, setting):
        self._writers = []
        for kind in kinds(setting):
            for old in glob.glob(os.path.join(glob.escape(folder), kind, WRITERS[kind].files)):
                os.remove(old)
            self._writers.append(WRITERS[kind](os.path.join(folder, kind)))
        with contextlib.suppress(FileNotFoundError):
            self._write(read_metrics(folder))

    def add(self, record):
        """Adds the finite numbers of a metrics.jsonl record. After an error, which is logged, it adds nothing more."""
        try:
            self._write([record])
        except OSError as error:
            self._writers = []  # what follows an incomplete record cannot be read
            logger.error(f'no more scalars: {error.strerror}; training continues, metrics.jsonl has the numbers, and '
                         'resuming the run writes all scalars anew')

    def _write(self, records):
        for writer in self._writers:
            for record in records:
                event = '_'.join(filter(None, (record['event'], record.get('weights'))))
                for name, value in record.items():
                    if name not in ('time', 'step') and isinstance(value, (int, float)) and math.isfinite(value):
                        writer.add(f'{event}/{name}', value, record['step'], record['time'])
            writer.flush()
