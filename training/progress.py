"""Progress of an epoch: sums over its steps, a progress bar or log lines, the time they take."""
import os
import time

from tqdm import tqdm

import utils
from utils import logger

REPORT_SECONDS = 60  # without a progress line in a log


def epoch_sums(skipped_in_a_row=0):
    """What the steps of an epoch add up to, at its beginning; plain numbers, over all ranks, for a checkpoint.

    Returns:
        dict of steps, loss and loss_images (of the steps that were not skipped), skipped, skipped_in_a_row, lr (of
        the last step), images, waited and seconds.
    """
    return {'steps': 0, 'loss': 0.0, 'loss_images': 0, 'skipped': 0, 'skipped_in_a_row': skipped_in_a_row,
            'lr': 0.0, 'images': 0, 'waited': 0.0, 'seconds': 0.0}


class Progress:
    """Progress of one pass: tqdm on a terminal, plain lines elsewhere; counts images and the wait for data."""

    def __init__(self, name, steps, report_freq, steps_left=None, sums=None):
        sums = sums or epoch_sums()
        self.name, self.steps, self.report_freq = name, steps, report_freq
        self.steps_left = steps if steps_left is None else steps_left
        self.images, self.waited, self.done = sums['images'], sums['waited'], sums['steps']
        self.reported = time.perf_counter()
        self.start = self.reported - sums['seconds']
        terminal = utils.is_main() and os.isatty(2)
        self.bar = tqdm(total=steps, initial=self.done, desc=name, leave=False) if terminal else None

    def timed(self, loader):
        """Yields the batches and adds up the time it takes to get them."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def step(self, images, **values):
        """Counts one step over `images` images (of all ranks, where the figures of all are known)."""
        self.images += images
        self.done += 1
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        values = {**{k: f'{v:.3g}' if k == 'lr' else f'{v:.4f}' for k, v in values.items()},
                  'images/s': f'{self.images / seconds:.1f}', 'wait': f'{100 * self.waited / seconds:.0f}%'}
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update()
        elif self._due(now):
            self.reported = now
            eta = (self.steps_left - self.done) * seconds / self.done
            line = ' '.join(f'{k} {v}' for k, v in values.items())
            logger.info(f'{self.name} step {self.done}/{self.steps} {line} eta {duration(eta)}')

    def _due(self, now):
        if self.report_freq and (self.done % self.report_freq == 0 or self.done == self.steps):
            return True
        return now - self.reported > REPORT_SECONDS

    def seconds(self):
        """Since the start, above 0; the time between a stop and its resumption left out."""
        return max(time.perf_counter() - self.start, 1e-9)

    def close(self):
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'
