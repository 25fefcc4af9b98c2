"""Progress of one pass over the data: totals over its steps, and a progress bar or log lines."""
import math
import os
import time

from tqdm import tqdm

import utils
from utils import logger

REPORT_SECONDS = 60  # longest time without a line in the log


def epoch_sums(skipped_in_a_row=0):
    """The totals of an epoch before its first step: plain numbers over all ranks, which a checkpoint stores.

    Returns:
        dict of steps, loss and loss_images (summed over the images of the steps that were not skipped), skipped and
        skipped_in_a_row (steps that overflowed under loss scaling), lr (of the last step), images, and waited (for
        data) and seconds (of this rank, time between an interruption and its resumption excluded).
    """
    return {'steps': 0, 'loss': 0.0, 'loss_images': 0, 'skipped': 0, 'skipped_in_a_row': skipped_in_a_row,
            'lr': 0.0, 'images': 0, 'waited': 0.0, 'seconds': 0.0}


def epoch_metrics(sums, steps):
    """The metrics of an epoch of `steps` steps from its totals.

    Returns:
        dict of loss (mean over images and ranks), lr (of the last step), steps, skipped (overflowing steps), images
        (of all ranks), images_per_s, data_wait (share of the time spent waiting for data) and seconds.
    """
    seconds = max(sums['seconds'], 1e-9)  # 0 if no step was left to do
    return {'loss': sums['loss'] / sums['loss_images'] if sums['loss_images'] else math.nan, 'lr': sums['lr'],
            'steps': steps, 'skipped': sums['skipped'], 'images': int(sums['images']),
            'images_per_s': sums['images'] / seconds, 'data_wait': sums['waited'] / seconds, 'seconds': seconds}


class Progress:
    """Shows the progress of one pass, with tqdm on a terminal and as log lines elsewhere.

    Args:
        name: what is in progress, such as 'epoch 3'.
        steps: of the whole pass.
        report_freq: steps between log lines; None for a line only every REPORT_SECONDS.
        steps_left: steps of the run from the start of this pass, for the ETA; None for those of this pass.
        sums: `epoch_sums` to continue from; `step` updates its steps, images, waited and seconds.
    """

    def __init__(self, name, steps, report_freq=None, steps_left=None, sums=None):
        self.name, self.steps, self.report_freq = name, steps, report_freq
        self.steps_left = steps if steps_left is None else steps_left
        self.sums = epoch_sums() if sums is None else sums
        self.waited = self.sums['waited']
        self.reported = time.perf_counter()
        self.start = self.reported - self.sums['seconds']
        terminal = utils.is_main() and os.isatty(2)
        self.bar = tqdm(total=steps, initial=self.sums['steps'], desc=name, leave=False) if terminal else None

    def timed(self, loader):
        """Yields the batches of `loader` and measures the time spent waiting for them."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def step(self, images, **values):
        """Counts and shows one step.

        Args:
            images: of all ranks in training, of this rank in evaluation.
            values: {name: number} to show.
        """
        now = time.perf_counter()
        sums, seconds = self.sums, max(now - self.start, 1e-9)
        sums.update(steps=sums['steps'] + 1, images=sums['images'] + images, waited=self.waited, seconds=seconds)
        values = {**{k: f'{v:.3g}' if k == 'lr' else f'{v:.4f}' for k, v in values.items()},
                  'images/s': f"{sums['images'] / seconds:.1f}", 'wait': f'{100 * self.waited / seconds:.0f}%'}
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update()
        elif self._due(now):
            self.reported = now
            eta = (self.steps_left - sums['steps']) * seconds / sums['steps']
            line = ' '.join(f'{k} {v}' for k, v in values.items())
            logger.info(f"{self.name} step {sums['steps']}/{self.steps} {line} eta {duration(eta)}")

    def _due(self, now):
        done = self.sums['steps']
        if self.report_freq and (done % self.report_freq == 0 or done == self.steps):
            return True
        return now - self.reported > REPORT_SECONDS

    def close(self):
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds):
    """Seconds as H:MM:SS."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'
