"""The report of `python -m pytest tests/test_gpu.py --gpu=REPORT.md`: the machine, what tests found, and failures."""
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from atomic_file import atomic_file

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 6000  # characters of the text of a failure


def printed(command):
    """What a command prints, or why it could not run, in a Markdown code block."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
        text = (done.stdout + done.stderr).strip()
    except (OSError, subprocess.SubprocessError) as error:
        text = str(error)
    return f'`{" ".join(map(str, command))}`\n\n```\n{text}\n```\n'


def machine():
    """Versions and cards, as Markdown."""
    import paddle
    versions = [f'- date: {time.strftime("%Y-%m-%d %H:%M %z")}',
                f'- Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores',
                f'- Paddle {paddle.__version__}, CUDA {paddle.version.cuda()}, cuDNN {paddle.version.cudnn()}']
    if paddle.is_compiled_with_cuda():
        for index in range(paddle.device.cuda.device_count()):
            card = paddle.device.cuda.get_device_properties(index)
            versions.append(f'- gpu:{index}: {card.name}, compute capability {card.major}.{card.minor}, '
                            f'{card.total_memory / 1e9:.0f} GB, {card.multi_processor_count} multiprocessors')
    return '\n'.join(versions) + '\n\n' + '\n'.join(printed(command) for command in (
        ['git', 'describe', '--always', '--dirty'], ['nvidia-smi'], ['nvcc', '--version'],
        [sys.executable, '-m', 'large_kernel']))


class GpuReport:
    """A pytest plugin that writes the report when the tests end.

    Args:
        path: of the report, Markdown.
    """

    def __init__(self, path):
        self.path, self._reports = Path(path).expanduser(), {}

    def pytest_runtest_logreport(self, report):
        """Keeps the phase of each test that decides its outcome."""
        if report.when == 'call' or not report.passed:
            self._reports[report.nodeid] = report

    def pytest_sessionfinish(self):
        """Writes the report."""
        outcomes = [report.outcome for report in self._reports.values()]
        counts = ', '.join(f'{outcomes.count(name)} {name}' for name in ('passed', 'failed', 'skipped'))
        with atomic_file(self.path) as file:
            file.write(f'# RepLKNet in PaddlePaddle: tests on a GPU\n\n{counts}\n\n{machine()}\n{self._table()}\n'
                       f'{self._failures()}'.encode(errors='backslashreplace'))

    def pytest_terminal_summary(self, terminalreporter):
        """Says where the report is."""
        terminalreporter.write_line(f'report: {self.path}')

    def _table(self):
        rows = ['| test | outcome | s | found |', '|---|---|---|---|']
        for name, report in self._reports.items():
            found = '; '.join(f'{key}: {value}' for key, value in report.user_properties)
            if report.skipped:
                found = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            cells = (f'`{name.split("::")[-1]}`', report.outcome, f'{report.duration:.1f}', found)
            rows.append('| ' + ' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells) + ' |')
        return '\n'.join(rows) + '\n'

    def _failures(self):
        return '\n'.join(f'## {name}\n\n```\n{report.longreprtext[-LONGEST:]}\n```\n'
                         for name, report in self._reports.items() if report.failed)
