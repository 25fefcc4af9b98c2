"""Scalars for VisualDL and TensorBoard: the same numbers as metrics.jsonl, each step once."""
import importlib.util
import json
import os
import resource
import signal
import struct
import sys

import pytest

from config import ConfigError, config_changes, config_text, get_config
from run_folder.metrics import read_metrics
from run_folder.scalars import Scalars, require_packages

FAKES = {  # as much of the packages as is used; their files have a JSON object on each line
    'visualdl/__init__.py': """
import json, os
class LogWriter:
    def __init__(self, logdir):
        os.makedirs(logdir, exist_ok=True)
        self.file = open(f'{logdir}/vdlrecords.{os.getpid()}.log', 'w')
        self.flush = self.file.flush
    def add_scalar(self, tag, value, step, walltime):
        assert type(walltime) is int
        self.file.write(json.dumps([tag, step, value, walltime / 1000]) + '\\n')
""",
    'tensorboardX/__init__.py': '',
    'tensorboardX/summary.py': 'scalar = lambda name, scalar: (name, float(scalar))',
    'tensorboardX/proto/__init__.py': '',
    'tensorboardX/proto/event_pb2.py': """
class SessionLog:
    START = 1
    def __init__(self, status):
        self.status = status
class Event:
    def __init__(self, step, wall_time=0.0, summary=None, session_log=None):
        self.step, self.wall_time, self.summary, self.session_log = step, wall_time, summary, session_log
""",
    'tensorboardX/event_file_writer.py': """
import json, os
class EventsWriter:
    def __init__(self, file_prefix):
        self.file = open(f'{file_prefix}.out.tfevents.{os.getpid()}', 'w')
        self.flush = self.file.flush
    def write_event(self, event):
        if event.session_log:
            assert (event.step, event.session_log.status) == (0, 1)
            return
        name, value = event.summary
        self.file.write(json.dumps([name, event.step, value, event.wall_time]) + '\\n')
""",
}


@pytest.fixture(scope='module')
def fakes(tmp_path_factory):
    """A folder for PYTHONPATH with stand-ins for both packages."""
    folder = tmp_path_factory.mktemp('fakes')
    for name, text in FAKES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def expected(folder):
    """[tag, step, value, time] of every scalar that metrics.jsonl stands for."""
    return [['_'.join(filter(None, (r['event'], r.get('weights')))) + '/' + name, r['step'], pytest.approx(value),
             pytest.approx(r['time'], abs=1e-3)]
            for r in read_metrics(folder) for name, value in r.items()
            if name not in ('time', 'step') and isinstance(value, (int, float))]


def written(folder, kind):
    """The same from the only file that a stand-in has written."""
    file, = (folder / kind).iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def train(run_script, list_dataset, tiny_yaml, tmp_path):
    def train(*opts, script='main_single_gpu.py', flags=(), **environment):
        return run_script(script, f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-device=cpu',
                          f'-output={tmp_path}/run', *flags, '-opts', *opts, **environment)
    return train


def test_both_get_the_numbers_of_metrics_jsonl_also_after_resuming(train, fakes, tmp_path):
    run = tmp_path / 'run'
    done = train('SCALARS', 'both', 'TRAIN.NUM_EPOCHS', '1', PYTHONPATH=fakes)
    assert done.returncode == 0, done.stderr
    tags = {tag for tag, *_ in expected(run)}
    assert {'step/loss', 'step/lr', 'step/grad_norm', 'train/skipped', 'eval_model/acc1', 'eval_model_ema/loss'} <= tags
    assert written(run, 'visualdl') == written(run, 'tensorboard') == expected(run)
    for kind in ('visualdl', 'tensorboard'):  # as if the run had gone on before it was killed
        file, = (run / kind).iterdir()
        file.write_text(file.read_text() + json.dumps(['step/loss', 999, 1.0, 1.0]) + '\n')
    done = train('SCALARS', 'both', script='main_multi_gpu.py', flags=['-nprocs=2'], PYTHONPATH=fakes)
    assert done.returncode == 0, done.stderr
    assert len(expected(run)) > 1.5 * len(tags) and max(step for _, step, *_ in expected(run)) < 999
    assert written(run, 'visualdl') == written(run, 'tensorboard') == expected(run)


def test_scalars_that_are_switched_on_later_start_at_the_first_step(train, fakes, tmp_path):
    assert train('TRAIN.NUM_EPOCHS', '1').returncode == 0
    assert not {'visualdl', 'tensorboard'} & set(os.listdir(tmp_path / 'run'))
    done = train('SCALARS', 'tensorboard', PYTHONPATH=fakes)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / 'run', 'tensorboard') == expected(tmp_path / 'run')
    assert 'visualdl' not in os.listdir(tmp_path / 'run')


@pytest.mark.parametrize(('setting', 'package'), [
    ('visualdl', 'visualdl'), ('tensorboard', 'tensorboardX'), ('both', 'tensorboardX')])
def test_a_missing_package_is_reported_in_one_line(train, fakes, tmp_path, setting, package):
    (tmp_path / 'sitecustomize.py').write_text(f'import sys\nsys.modules["{package}"] = None\n')
    done = train('SCALARS', setting, script='main_multi_gpu.py', PYTHONPATH=f'{tmp_path}:{fakes}')
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        f'SCALARS {setting}: {package} is not installed; pip install {package}, or change SCALARS')
    assert not (tmp_path / 'run').exists()


def test_nothing_is_imported_without_need():
    require_packages('')
    assert not {'visualdl', 'tensorboardX'} & set(sys.modules)


def use(fakes, monkeypatch):
    """Makes this process import the stand-ins, until the test ends."""
    monkeypatch.syspath_prepend(fakes)
    for name in FAKES:
        module = name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
        monkeypatch.setitem(sys.modules, module, None)  # so that its import from the stand-ins is undone
        del sys.modules[module]


@pytest.fixture
def records(tmp_path):
    """A run folder whose metrics.jsonl has numbers that are left out."""
    records = [{'time': 1.5, 'event': 'step', 'step': 3, 'epoch': 0.5, 'loss': 1.5, 'grad_norm': float('inf'),
                'lr': None},
               {'time': 2.5, 'event': 'data', 'step': 4, 'epoch': 1, 'changed': ['val']},
               {'time': 3.5, 'event': 'eval', 'step': 4, 'epoch': 1, 'weights': 'model', 'acc1': float('nan')}]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return records


def test_only_finite_numbers_are_written(fakes, tmp_path, records, monkeypatch):
    use(fakes, monkeypatch)
    scalars = Scalars(tmp_path, 'both')
    for record in records:
        scalars.add({**record, 'step': record['step'] + 10})
    half = [['step/epoch', 3, 0.5, 1.5], ['step/loss', 3, 1.5, 1.5], ['data/epoch', 4, 1, 2.5],
            ['eval_model/epoch', 4, 1, 3.5]]
    for kind in ('visualdl', 'tensorboard'):
        assert written(tmp_path, kind) == half + [[tag, step + 10, *rest] for tag, step, *rest in half]


def test_a_full_disk_does_not_stop_training(fakes, tmp_path, records, monkeypatch):
    use(fakes, monkeypatch)
    lines = []
    monkeypatch.setattr('run_folder.scalars.logger.error', lines.append)
    scalars = Scalars(tmp_path, 'tensorboard')
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        for _ in range(200):
            scalars.add(records[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [line[:31] for line in lines] == ['no more scalars: File too large']


# ---- the key, and the one that it replaces

@pytest.mark.parametrize(('opts', 'value'), [
    (['VISUALDL', 'True'], 'visualdl'), (['VISUALDL', 'False'], ''),
    (['SCALARS', 'tensorboard', 'VISUALDL', 'True'], 'both'),
    (['VISUALDL', 'True', 'SCALARS', 'tensorboard'], 'tensorboard'),
    (['SCALARS', 'tensorboard', 'VISUALDL', 'False'], 'tensorboard'),
    (['SCALARS', 'both', 'VISUALDL', 'False'], 'tensorboard'), (['SCALARS', ''], '')])
def test_the_former_key_switches_visualdl(opts, value):
    assert get_config(None, opts).SCALARS == value
    assert 'VISUALDL' not in config_text(get_config(None, opts))


def test_values_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match='-opts: VISUALDL takes True or False, not 3; SCALARS is its new name'):
        get_config(None, ['VISUALDL', '3'])
    with pytest.raises(ConfigError, match="-opts: SCALARS is 'wandb'; choose from '', visualdl, tensorboard, both"):
        get_config(None, ['SCALARS', 'wandb'])


@pytest.mark.parametrize(('former', 'now', 'change'), [
    (True, 'visualdl', []), (False, '', []), (False, 'both', ["SCALARS '' -> 'both'"]),
    (True, '', ["SCALARS 'visualdl' -> ''"])])
def test_runs_of_earlier_versions_are_resumed(tmp_path, former, now, change):
    config = get_config(None, ['SCALARS', now])
    text = config_text(config).replace(f"SCALARS: {now or repr('')}", f'VISUALDL: {former}')
    assert 'SCALARS' not in text
    assert config_changes(text, config) == ([], change)
    (tmp_path / 'config.yaml').write_text(text)
    assert get_config(tmp_path / 'config.yaml').SCALARS == ('visualdl' if former else '')


# ---- the packages themselves

def events(file):
    """The events of a TensorBoard file, a sequence of (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event
    data = file.read_bytes()
    while data:
        length, = struct.unpack('<Q', data[:8])
        yield Event.FromString(data[12:12 + length])
        data = data[16 + length:]


@pytest.mark.skipif(not importlib.util.find_spec('tensorboardX'), reason='needs tensorboardX')
def test_the_files_of_tensorboardx(train, tmp_path):
    for epochs in '12':
        done = train('SCALARS', 'tensorboard', 'TRAIN.NUM_EPOCHS', epochs)
        assert done.returncode == 0, done.stderr
    file, = (tmp_path / 'run/tensorboard').iterdir()
    first, start, *scalars = events(file)
    assert first.file_version == 'brain.Event:2' and start.session_log.status == start.session_log.START
    got = [[e.summary.value[0].tag, e.step, e.summary.value[0].simple_value, e.wall_time] for e in scalars]
    assert got == expected(tmp_path / 'run')


@pytest.mark.skipif(not importlib.util.find_spec('visualdl'), reason='needs visualdl')
def test_the_files_of_visualdl(train, tmp_path):
    for epochs in '12':
        done = train('SCALARS', 'visualdl', 'TRAIN.NUM_EPOCHS', epochs)
        assert done.returncode == 0, done.stderr
    from visualdl import LogReader
    file, = (tmp_path / 'run/visualdl').iterdir()
    reader, wanted = LogReader(file_path=str(file)), expected(tmp_path / 'run')
    for tag in {tag for tag, *_ in wanted}:
        got = [[tag, r.id, r.value, r.timestamp / 1000] for r in reader.get_data('scalar', tag)]
        assert got == [line for line in wanted if line[0] == tag]
