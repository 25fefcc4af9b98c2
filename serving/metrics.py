"""Counters of the service in the text format of Prometheus."""
import bisect
from collections import Counter

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    def __init__(self, bounds):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value):
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name):
        total = 0
        for bound, count in zip((*self._bounds, '+Inf'), self._counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f'{name}_sum {self._sum:.6f}'
        yield f'{name}_count {total}'


class Metrics:
    """What the service has done since it started. Used only in the thread of the event loop."""

    def __init__(self):
        self.requests = Counter()  # of (path, status)
        self.images = Counter()  # of 'ok' or 'error'
        self.restarts = 0
        self.seconds, self.batches = Histogram(SECONDS), Histogram(IMAGES)

    def text(self, **gauges):
        """The metrics; `gauges` are further ones, {name: (value, help text)}."""
        lines = []

        def family(name, kind, text, samples):
            lines.extend((f'# HELP replknet_{name} {text}', f'# TYPE replknet_{name} {kind}', *samples))

        family('requests_total', 'counter', 'Requests answered, by path and status.', (
            f'replknet_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())))
        family('images_total', 'counter', 'Images answered, by outcome.', (
            f'replknet_images_total{{outcome="{outcome}"}} {self.images[outcome]}' for outcome in ('ok', 'error')))
        family('worker_restarts_total', 'counter', 'Workers that ended and were restarted.',
               [f'replknet_worker_restarts_total {self.restarts}'])
        family('request_seconds', 'histogram', 'Time from the headers of /predict and /batch to the response.',
               self.seconds.lines('replknet_request_seconds'))
        family('batch_images', 'histogram', 'Images per forward pass.', self.batches.lines('replknet_batch_images'))
        for name, (value, text) in gauges.items():
            family(name, 'gauge', text, [f'replknet_{name} {value}'])
        return '\n'.join(lines) + '\n'
