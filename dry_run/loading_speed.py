"""How many DataLoader workers a run needs, from the time that some of its images take on this machine."""
import math
import os
import time
from dataclasses import dataclass

import numpy as np

from image_files.decode import DataError

IMAGES, SECONDS = 64, 2.0  # most images that are loaded, and the time after which no further one is
MARGIN, MARGIN_OF_MANY, MANY = 1.2, 1.6, 8  # the rule of docs/data.md


@dataclass(frozen=True)
class LoadingSpeed:
    """What loading a training image takes on average: reading, decoding and augmenting it.

    Attributes:
        seconds: until a worker has it.
        computing: of these, the time that keeps a core busy; the rest is waiting for the file system.
    """
    seconds: float
    computing: float

    def rate(self, workers):
        """Images per second that so many workers load, each with a core of its own; 0 workers load like one."""
        return max(1, workers) / self.seconds

    def workers(self, images_per_s):
        """Number of workers for so many images per second.

        If each were always loading, images_per_s * seconds would be enough. MARGIN times as many were needed up to MANY
        workers, and MARGIN_OF_MANY for each further one.
        """
        enough = images_per_s * self.seconds
        return math.ceil(MARGIN * enough + (MARGIN_OF_MANY - MARGIN) * max(0, enough - MANY / MARGIN))

    def cores(self, images_per_s):
        """Number of cores that these workers keep busy."""
        return images_per_s * self.computing


def measure_loading(dataset):
    """Loads some images of a training set; returns a `LoadingSpeed`, or None if none of them can be read."""
    indices = np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).astype(int).tolist()
    wall, busy, count, began = 0.0, 0.0, 0, time.perf_counter()
    for position, index in enumerate([indices[0], *indices]):
        start, start_busy = time.perf_counter(), time.thread_time()
        try:
            dataset[(0, index)]
        except DataError:
            continue
        if position:  # the first call also prepares tables
            wall, busy, count = wall + time.perf_counter() - start, busy + time.thread_time() - start_busy, count + 1
        if time.perf_counter() - began > SECONDS and count:
            break
    return LoadingSpeed(wall / count, busy / count) if count else None


def loading_rows(loading, config, speed, processes):
    """The rows of the report.

    Args:
        loading: LoadingSpeed.
        config: settings.
        speed: images per second that a process trains on; None if unknown.
        processes: on this machine; None if the run is planned for other machines.
    """
    workers = config.DATA.NUM_WORKERS
    condition = 'if each worker has a core' if workers else 'while the model waits'
    enough = f'-num_workers={workers} loads about {loading.rate(workers):,.0f} images/s per process, {condition}'
    rows = [('loading', f'{1000 * loading.seconds:.1f} ms per image in one worker here, {1000 * loading.computing:.1f} '
                        f'ms of it computing'), ('', enough)]
    if speed:
        needed, cores = loading.workers(speed), loading.cores(speed)
        rows.append(('workers needed', f'{needed:,} per process for {speed:,.0f} images/s; they keep {cores:.1f} cores '
                                       'busy'))
        if processes and cores * processes > os.cpu_count():
            rows.append(('', f'all processes need {cores * processes:.0f} cores to load images, but this machine has '
                             f'{os.cpu_count()}'))
    return rows
