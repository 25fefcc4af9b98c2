"""The worker processes, and the queue of images that wait for them."""
import asyncio
import collections
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field

from errors import UserError
from serving.frames import frame, receive_frame
from serving.limits import Refusal

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START = 'import sys; sys.path[0] = sys.argv[1]; from serving.worker import main; main()'  # in any working directory
LONGEST_PAUSE = 30  # seconds before a worker that keeps ending is restarted


@dataclass
class Job:
    """An image that is accepted. `trials` counts the workers that ended while they were processing it."""
    data: bytes
    options: dict
    answer: asyncio.Future
    trials: int = 0
    sent: float = 0


@dataclass
class Process:
    """A worker as the service sees it: {id: job} of the images that it has."""
    process: asyncio.subprocess.Process
    jobs: dict = field(default_factory=dict)
    ready: bool = False
    heard: float = 0  # when it last sent a message


class WorkerPool:
    """Starts workers, sends them images, and restarts them when they end.

    If a worker ends, its images are sent to another one, each of them alone, since one of them may be the cause. An
    image on which two workers ended is refused.

    Args:
        settings: see `serving.worker.Worker`.
        workers: number of processes.
        limits: `Limits`.
        metrics: `Metrics`.
    Attributes:
        model: description of the model, from the first worker that is ready.
    """

    def __init__(self, settings, workers, limits, metrics):
        self._settings, self._limits, self._metrics = settings, limits, metrics
        self._window = 2 * settings['batch_size']  # images in a worker: one batch computes, the next one is decoded
        self._waiting, self._workers, self._number = collections.deque(), [], 0
        self._count, self._tasks, self._closing, self._draining = workers, [], False, False
        self._seconds = 0.0  # per image, a moving average
        self.accepted, self.model = 0, None

    @property
    def ready(self):
        return not self._draining and any(worker.ready for worker in self._workers)

    async def start(self):
        """Starts the workers; returns when one is ready.

        Raises:
            UserError: a worker cannot load the model.
        """
        first = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._keep_running(first, number)) for number in range(self._count)]
        self._tasks.append(asyncio.create_task(self._watch()))
        await first

    def drain(self):
        """From now on the service is not ready; images that were accepted are still answered."""
        self._draining = True

    async def close(self):
        """Ends the workers, which have answered everything if the server has stopped gracefully."""
        self._closing = True
        workers = list(self._workers)
        for worker in workers:
            worker.process.stdin.close()
        ends = [asyncio.ensure_future(worker.process.wait()) for worker in workers]
        if ends and (await asyncio.wait(ends, timeout=5))[1]:
            for worker in workers:
                self._kill(worker)
            await asyncio.wait(ends)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, images, options):
        """Accepts images, all or none.

        Args:
            images: list of the bytes of files.
            options: result of `serving.bodies.read_options`.
        Returns:
            list of futures of answers, dicts as a worker sends them; cancelling a future removes its image from
            the queue.
        Raises:
            Refusal: the queue is full.
        """
        self.check_queue(len(images))
        jobs = [Job(data, options, asyncio.get_running_loop().create_future()) for data in images]
        self.accepted += len(jobs)
        for job in jobs:
            job.answer.add_done_callback(self._answered)
        self._waiting.extend(jobs)
        self._dispatch()
        return [job.answer for job in jobs]

    def check_queue(self, images=1):
        """Raises Refusal unless the queue has room for this many images."""
        if self.accepted + images > self._limits.queue:
            seconds = math.ceil(self.accepted * self._seconds / self._count)
            raise Refusal(503, 'the queue is full; try again later', retry_after=min(max(seconds, 1), 60))

    def _answered(self, _):
        self.accepted -= 1

    def _dispatch(self):
        """Sends waiting images to the workers that have the fewest."""
        while self._waiting:
            if self._waiting[0].answer.done():  # its client no longer waits
                self._waiting.popleft()
                continue
            ready = [worker for worker in self._workers if worker.ready and not any(
                job.trials for job in worker.jobs.values())]
            worker = min(ready, key=lambda worker: len(worker.jobs), default=None)
            room = 1 if self._waiting[0].trials else self._window
            if worker is None or len(worker.jobs) >= room:
                return
            job = self._waiting.popleft()
            job.sent, self._number = time.monotonic(), self._number + 1
            worker.jobs[self._number] = job
            worker.process.stdin.write(frame({'id': self._number, **job.options}, job.data))

    async def _keep_running(self, first, number):
        settings, pause = json.dumps({**self._settings, 'share': (number, self._count)}), 1
        while not self._closing:
            started = time.monotonic()
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, '-c', START, ROOT, settings, stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE, limit=2**20, start_new_session=True)
            except OSError as error:  # no memory, or too many processes: this may pass
                message = f'a worker cannot be started: {error.strerror}'
                if not first.done():
                    first.set_exception(UserError(message))
                    return
                print(f'serve.py: {message}; trying again in {pause} seconds', file=sys.stderr, flush=True)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            worker = Process(process)
            self._workers.append(worker)
            try:
                message = await self._serve(worker, first)
            finally:
                self._workers.remove(worker)
            try:
                await asyncio.wait_for(process.wait(), 1)
            except asyncio.TimeoutError:
                self._kill(worker)
                await process.wait()
            if not first.done():
                first.set_exception(UserError(message or 'the worker ended before it was ready; see above'))
                return
            if self._closing:
                return
            self._metrics.restarts += 1
            print(f'serve.py: a worker ended with status {process.returncode}{message and ": " + message}; '
                  f'it is restarted, and {len(worker.jobs)} images are repeated', file=sys.stderr, flush=True)
            self._repeat(worker.jobs.values())
            if time.monotonic() - started < LONGEST_PAUSE and not worker.ready:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = 1

    async def _serve(self, worker, first):
        """Receives a worker's messages until it ends; returns why it ended, if it said so."""
        message = ''
        # the last four: messages that no sound worker sends
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ValueError, LookupError, TypeError,
                                 AttributeError):
            while True:
                header, _ = await receive_frame(worker.process.stdout)
                worker.heard = time.monotonic()
                if 'fatal' in header:
                    message = header['fatal']
                elif 'ready' in header:
                    worker.ready, self.model = True, header['ready']
                    if not first.done():
                        first.set_result(None)
                elif 'batch' in header:
                    self._metrics.batches.add(header['batch'])
                    seconds = header['seconds'] / header['batch']
                    self._seconds = 0.9 * self._seconds + 0.1 * seconds if self._seconds else seconds
                else:
                    job = worker.jobs.pop(header.pop('id'))
                    if not job.answer.done():
                        job.answer.set_result(header)
                self._dispatch()
        return message

    def _repeat(self, jobs):
        for job in reversed(list(jobs)):
            job.trials += 1
            if job.trials < 2:
                self._waiting.appendleft(job)
            elif not job.answer.done():
                job.answer.set_result({'status': 500, 'error': 'the image could not be processed: two worker '
                                       'processes ended on it'})
        self._dispatch()

    async def _watch(self):
        """Kills workers that do not answer: a decoder or a driver may hang."""
        while True:
            await asyncio.sleep(min(1, self._limits.timeout / 4))
            late = time.monotonic() - self._limits.timeout
            for worker in self._workers:
                if worker.heard < late and any(job.sent < late for job in worker.jobs.values()):
                    self._kill(worker)

    @staticmethod
    def _kill(worker):
        with contextlib.suppress(ProcessLookupError):
            worker.process.kill()
