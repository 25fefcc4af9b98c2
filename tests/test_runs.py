"""The main scripts as a user runs them: real processes and files, with one and with several ranks."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import forked
import numpy as np
import pytest

from errors import exit_status
from launcher import run_single
from port_weights.safe_load import read_checkpoint
from training.schedules import Schedule

LINE = re.compile(r'^Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d+\.\d{4} images \d+(?: model| EMA)?$', re.M)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, run_script, list_dataset, tiny_yaml):
    """{processes: (run folder, output)} of complete runs of two epochs in one and in two processes."""
    runs = {}
    for count, script in ((1, 'main_single_gpu.py'), (2, 'main_multi_gpu.py')):
        folder = tmp_path_factory.mktemp('runs') / f'run{count}'
        done = run_script(script, f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', f'-output={folder}', '-device=cpu',
                          '-accum_iter=2', '-opts', 'SAVE_FREQ', '1', real=count == 1)
        assert done.returncode == 0, done.stderr
        runs[count] = (folder, done.stdout)
    return runs


def assert_same(a, b, where=''):
    """Two checkpoints hold the same bytes."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            assert_same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), where
    else:
        assert a == b, where


@pytest.mark.parametrize('count', [1, 2])
def test_a_run_leaves_settings_logs_and_checkpoints(trained, count):
    folder, output = trained[count]
    assert {'config.yaml', 'log.txt', 'metrics.jsonl', 'last.pdparams', 'previous.pdparams', 'best.pdparams',
            'best_ema.pdparams', 'epoch_0001.pdparams', 'epoch_0002.pdparams'} == set(os.listdir(folder))
    assert len(LINE.findall(output)) == 4  # in two epochs, of the model and its EMA
    assert [line.split('images ')[1] for line in LINE.findall(output)] == ['11 model', '11 EMA'] * 2
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    records = [r for r in lines if r['event'] != 'step']
    assert [(r['event'], r['epoch'], r.get('weights')) for r in records] == [
        (event, epoch, weights) for epoch in (1, 2)
        for event, weights in (('train', None), ('eval', 'model'), ('eval', 'model_ema'))]
    steps = 3 if count == 1 else 2  # 13 images: 6 micro-batches of 2, or 3 of 2 x 2; two per step
    assert [r['step'] for r in records if r['event'] == 'train'] == [steps, 2 * steps]
    assert records[0]['images'] == 12
    # warm-up over the first epoch, cosine over the second; BASE_LR is not scaled to the global batch
    lr_at = Schedule(base_lr=1e-2, start_lr=1e-6, end_lr=1e-6, warmup_steps=steps, total_steps=2 * steps)
    assert [r['lr'] for r in records if r['event'] == 'train'] == [lr_at(steps - 1), lr_at(2 * steps - 1)]
    reported = [r for r in lines if r['event'] == 'step']
    assert [r['step'] for r in reported] == list(range(1, 2 * steps + 1))
    assert [r['epoch'] for r in reported] == pytest.approx([r['step'] / steps for r in reported])
    assert all(r['grad_norm'] > 0 and r['images_per_s'] > 0 for r in reported)
    assert reported[-1]['lr'] == records[-3]['lr']
    log = (folder / 'log.txt').read_text()
    assert 'parameters' in log and 'images/s' in log and 'eta' in log and 'Acc@1' in log
    assert ('averaged over the processes' in log) == (count == 2)


@pytest.mark.parametrize('count', [1, 2])
def test_a_resumed_run_ends_like_an_uninterrupted_one(trained, run_script, list_dataset, tmp_path, count):
    folder, _ = trained[count]
    again = tmp_path / 'again'
    done = run_script('main_single_gpu.py' if count == 1 else 'main_multi_gpu.py', '-device=cpu',
                      f'-resume={folder}/epoch_0001.pdparams', f'-data_path={list_dataset}', f'-output={again}')
    assert done.returncode == 0, done.stderr
    states = [read_checkpoint(f'{run}/last.pdparams') for run in (again, folder)]
    for state in states:
        del state['metrics_bytes'], state['numbered']  # these describe other files of the folder
    assert_same(*states)


@pytest.mark.long
@pytest.mark.parametrize('name', ['sgd', 'momentum', 'nadam', 'lion', 'adan', 'lamb'])
def test_every_optimizer_resumes_exactly(run_script, list_dataset, tiny_yaml, tmp_path, name):
    flags = [f'-data_path={list_dataset}', '-device=cpu', '-accum_iter=2']
    opts = ['-opts', 'SAVE_FREQ', '1', 'TRAIN.OPTIMIZER.NAME', name, 'TRAIN.WEIGHT_DECAY_END', '0.2',
            'TRAIN.OPTIMIZER.BETAS', '[0.98, 0.92, 0.99]' if name == 'adan' else '[0.9, 0.99]',
            'TRAIN.LR_SCHEDULER.NAME', 'exponential', 'TRAIN.LR_SCHEDULER.DECAY_EPOCHS', '1']
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    for args in ([f'-cfg={tiny_yaml}', f'-output={whole}', *flags, *opts],
                 [f'-resume={whole}/epoch_0001.pdparams', f'-output={resumed}', *flags]):
        done = run_script('main_single_gpu.py', *args)
        assert done.returncode == 0, done.stderr
    states = [read_checkpoint(f'{run}/last.pdparams') for run in (whole, resumed)]
    for state in states:
        del state['metrics_bytes'], state['numbered']  # these describe other files of the folder
    assert_same(*states)


def test_resuming_in_place_continues_from_the_checkpoint(trained, run_script, list_dataset, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in ('config.yaml', 'metrics.jsonl'):
        (folder / name).write_bytes((trained[1][0] / name).read_bytes())
    (folder / 'last.pdparams').write_bytes((trained[1][0] / 'epoch_0001.pdparams').read_bytes())
    done = run_script('main_single_gpu.py', '-device=cpu', f'-resume={folder}', f'-data_path={list_dataset}')
    assert done.returncode == 0, done.stderr
    assert (folder / 'metrics.jsonl').read_text().count('\n') == 12  # the lines of the second epoch were written again
    assert read_checkpoint(folder / 'last.pdparams')['epoch'] == 2


@pytest.mark.parametrize('which', [pytest.param('best', marks=pytest.mark.long), 'best_ema'])
def test_evaluation_is_the_same_for_any_number_of_processes(trained, run_script, list_dataset, which):
    folder, _ = trained[2]
    lines = []
    for count in (1, 3):
        done = run_script('main_multi_gpu.py', '-eval', f'-pretrained={folder}/{which}.pdparams', '-device=cpu',
                          f'-data_path={list_dataset}', '-nprocs', count)
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.splitlines()[-1])
    assert LINE.match(lines[0]) and lines == [lines[0]] * 2
    records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    weights = {'best': 'model', 'best_ema': 'model_ema'}[which]
    best = max(r['acc1'] for r in records if r.get('weights') == weights)
    assert f'Acc@1 {best:.3f} ' in lines[0]


def test_the_launcher_of_paddle_starts_the_same_run(trained, list_dataset, tiny_yaml, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    env.pop('CUDA_VISIBLE_DEVICES', None)  # Paddle's launcher takes an empty one for a list of GPUs
    done = subprocess.run(
        [sys.executable, '-m', 'paddle.distributed.launch', '--nproc_per_node', '2', '--log_dir', str(tmp_path / 'log'),
         f'{ROOT}/main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', f'-output={tmp_path}/run',
         '-device=cpu', '-accum_iter=2', '-opts', 'SAVE_FREQ', '1'],
        capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(read_checkpoint(tmp_path / 'run/last.pdparams')['model'],
                read_checkpoint(trained[2][0] / 'last.pdparams')['model'])


SRUN = """#!/bin/sh
# one task on each of two machines; both are this machine
for node in 0 1; do
    SLURM_NODEID=$node "$@" >"task$node" 2>&1 &
    tasks="$tasks $!"
done
status=0
for task in $tasks; do wait "$task" || status=$?; done
exit "$status"
"""


def test_two_machines_train_like_two_processes_on_one(trained, list_dataset, tiny_yaml, tmp_path):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/srun').write_text(SRUN)
    (tmp_path / 'bin/srun').chmod(0o755)
    with socket.socket() as free:  # the port that the script derives from the number of the job
        free.bind(('', 20000 + os.getpid() % 10000))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'SLURM_NNODES': '2', 'SLURM_JOB_ID': str(os.getpid()),
           'SLURM_SUBMIT_DIR': ROOT,
           'PATH': f'{tmp_path}/bin:{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'}
    done = subprocess.run(
        ['sh', f'{ROOT}/run_train_slurm.sh', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}',
         f'-output={tmp_path}/run', '-device=cpu', '-accum_iter=2', '-opts', 'SAVE_FREQ', '1'],
        capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    outputs = [(tmp_path / f'task{node}').read_text() for node in (0, 1)]
    assert done.returncode == 0, done.stderr + outputs[0] + outputs[1]
    assert_same(read_checkpoint(tmp_path / 'run/last.pdparams')['model'],
                read_checkpoint(trained[2][0] / 'last.pdparams')['model'])
    records = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert [r['processes'] for r in records if r['event'] == 'train'] == [2, 2]
    # each machine has one process, so both have local rank 0; only global rank 0 writes and prints
    assert len(LINE.findall(outputs[0])) == 4 and not LINE.search(outputs[1])
    assert sorted(os.listdir(tmp_path / f'log/{os.getpid()}')) == ['0', '1']
    alone = socket.gethostbyname(socket.getfqdn()).startswith('127.')
    assert ('which other machines cannot reach' in done.stderr) == alone


def test_two_processes_with_accumulation_compute_the_gradients_of_one(run_script, tmp_path):
    done = run_script('tests/two_process_gradients.py', tmp_path / 'out', 'plain', PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    one, first, second = (np.load(f'{tmp_path}/out.{name}.npz') for name in ('one', '0', '1'))
    for name in (n for n in one if n.startswith('weight/')):
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert first['images'] == one['images'] == 20
    np.testing.assert_allclose(first['loss'], one['loss'], rtol=1e-5)
    np.testing.assert_allclose(first['mean'], [1.5, 2.5])
    np.testing.assert_allclose(second['mean'], [1.5, 2.5])
    for rank in (first, second):  # one in each of three optimizer steps, and one at the end of an evaluation
        assert rank['exchanges'].tolist() == [3, 1]
        assert re.match(r'step 2 \(epoch 1\): the loss is not finite on rank 1, lr', str(rank['stopped']))


@pytest.mark.long
def test_ranks_wait_for_each_other_beyond_the_timeout_of_gloo(run_script, tmp_path):
    done = run_script('tests/two_process_gradients.py', tmp_path / 'out', 'wait', PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out.0.npz').exists() and (tmp_path / 'out.1.npz').exists()


@pytest.mark.parametrize('count', [1, 2])
def test_a_loss_that_is_not_finite_stops_every_rank_in_one_line(run_script, list_dataset, tiny_yaml, tmp_path, count):
    began = time.monotonic()
    done = run_script('main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', f'-output={tmp_path}/run',
                      '-device=cpu', '-nprocs', count, '-opts', 'TRAIN.BASE_LR', '1e30', 'TRAIN.WARMUP_EPOCHS', '0')
    assert done.returncode == 1
    assert re.fullmatch(r'step \d+ \(epoch 1\): the loss is not finite on rank [01](, 1)?, lr .*\n', done.stderr)
    assert not (tmp_path / 'run/last.pdparams').exists()
    assert time.monotonic() - began < 60


def test_when_a_rank_is_killed_the_others_are_stopped(list_dataset, tiny_yaml, tmp_path):
    process = forked.Popen(
        [sys.executable, f'{ROOT}/main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}',
         f'-output={tmp_path}/run', '-device=cpu', '-opts', 'TRAIN.NUM_EPOCHS', '100000'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any('epoch 2' in line for line in process.stdout), process.communicate()[1]
        ranks = forked.children(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert 'process 1 ended with signal 9; the others were stopped' in errors
    finally:
        process.kill()


def mistakes(folder, dataset, yaml, run):
    """Yields (name, flags, words of the message) for every mistake."""
    half = folder / 'half'
    half.mkdir()
    (half / 'val_list.txt').write_text('nothing here.jpg 0\n')
    bad = folder / 'bad'
    bad.mkdir()
    (bad / 'val_list.txt').write_text(f'{dataset}/val/class 0/0.jpg 4\n')
    junk = folder / 'junk.pdparams'
    junk.write_bytes(b'junk' * 10)
    base = [f'-cfg={yaml}', f'-data_path={dataset}', '-device=cpu']
    yield 'no config', ['-data_path=x'], '-cfg is missing'
    yield 'not in weights', ['-eval', '-pretrained=replknet_31b_1k_224', '-device=cpu'], 'put RepLKNet-31B_Imag'
    yield 'config not there', ['-cfg=nowhere.yaml'], 'nowhere.yaml: no such config file'
    yield 'flag', [*base, '-batchsize=2'], 'unrecognized arguments: -batchsize=2'
    yield 'flag value', [*base, '-batch_size=two'], "invalid int value: 'two'"
    yield 'no list', [f'-cfg={yaml}', f'-data_path={folder}', '-device=cpu'], 'val_list.txt: no such list file'
    yield 'data path is a file', [f'-cfg={yaml}', f'-data_path={junk}', '-device=cpu'], 'cannot be read'
    yield 'optimizer', [*base, f'-resume={run}', '-opts', 'TRAIN.OPTIMIZER.NAME', 'sgd'], "NAME 'adamw' -> 'sgd'"
    yield 'output is a file', [*base, f'-output={junk}'], 'is a file; name a folder'
    yield 'no image', [f'-cfg={yaml}', f'-data_path={half}', '-device=cpu'], 'val_list.txt:1: '
    yield 'label', [f'-cfg={yaml}', f'-data_path={bad}', '-device=cpu'], 'val_list.txt:1: label 4 is out of range'
    yield 'weights not there', [*base, '-eval', '-pretrained=no.pdparams'], 'no.pdparams'
    yield 'two starts', [*base, f'-resume={run}', '-pretrained=w'], '-pretrained and -resume exclude each other'
    yield 'weights damaged', [*base, '-eval', f'-pretrained={junk}'], 'junk.pdparams'
    yield 'nothing to evaluate', [*base, '-eval'], '-eval needs weights'
    yield 'nothing to continue', [*base, '-last_epoch=1'], '-last_epoch=1: there is nothing to continue from'
    yield 'batch too large', [*base, '-batch_size=100'], 'fewer than one global batch'
    yield 'policy', [*base, '-opts', 'TRAIN.AUTO_AUGMENT', 'rand-x9'], 'rand-x9'
    yield 'device', [f'-cfg={yaml}', f'-data_path={dataset}', '-device=gpu'], '-device=gpu'


PROCESSES = ('no config', 'flag', 'no image', 'weights damaged')  # the others are tried without starting one


def test_a_mistake_is_one_line_with_status_2(trained, run_script, list_dataset, tiny_yaml, tmp_path, monkeypatch,
                                             capsys):
    for name, flags, words in mistakes(tmp_path, list_dataset, tiny_yaml, trained[1][0] / 'epoch_0001.pdparams'):
        flags = [f'-output={tmp_path}/run', *flags]
        if name in PROCESSES:
            done = run_script('main_single_gpu.py', *flags)
            status, errors = done.returncode, done.stderr
        else:
            monkeypatch.setattr(sys, 'argv', ['main_single_gpu.py', *map(str, flags)])
            capsys.readouterr()
            try:
                status = exit_status(run_single, '')
            except SystemExit as error:  # of the command line's parser
                status = error.code
            errors = capsys.readouterr().err
        assert status == 2, f'{name}: {errors}'
        assert words in errors and errors.count('\n') == 1, f'{name}: {errors}'
        assert not (tmp_path / 'run').exists(), name


def test_an_unexpected_error_in_a_process_shows_its_traceback_once(run_script, list_dataset, tiny_yaml, tmp_path):
    done = run_script('main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', f'-output={tmp_path}/run',
                      '-device=cpu', LARGE_KERNEL_CONV_IMPL='custom', CXX='/no/compiler')
    assert done.returncode == 1
    assert done.stderr.count('Traceback') == 1 and 'no C++ compiler' in done.stderr


def test_several_processes_report_a_mistake_once(run_script, tiny_yaml, tmp_path):
    done = run_script('main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={tmp_path}', '-device=cpu',
                      f'-output={tmp_path}/run')
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1 and 'no such list file' in done.stderr


def test_a_damaged_image_stops_the_run_and_names_its_line(run_script, tiny_yaml, tmp_path):
    (tmp_path / 'a.jpg').write_bytes(b'\xff\xd8 no image')
    (tmp_path / 'train_list.txt').write_text('a.jpg 0\n' * 4)
    (tmp_path / 'val_list.txt').write_text('a.jpg 0\n')
    for workers, script in ((0, 'main_single_gpu.py'), (1, 'main_multi_gpu.py')):
        done = run_script(script, f'-cfg={tiny_yaml}', f'-data_path={tmp_path}', '-device=cpu',
                          f'-output={tmp_path}/run{workers}', '-num_workers', workers)
        assert done.returncode == 2
        assert done.stderr.count('\n') == 1 and re.search(r'train_list.txt:\d: .*a.jpg', done.stderr), done.stderr


@pytest.mark.parametrize(('flags', 'words'), [
    ([], 'all 2 epochs are done'),
    (['-opts', 'TRAIN.BASE_LR', '0.02', 'SEED', '7'], 'TRAIN.BASE_LR 0.01 -> 0.02; SEED 42 -> 7;')])
def test_the_folder_of_a_finished_or_another_run_is_never_written(trained, run_script, list_dataset, tiny_yaml, flags,
                                                             words):
    folder, _ = trained[1]
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    done = run_script('main_single_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', f'-output={folder}',
                      '-accum_iter=2', *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_another_number_of_processes_keeps_the_learning_rate_of_the_epoch(trained, run_script, list_dataset, tmp_path):
    done = run_script('main_multi_gpu.py', f'-resume={trained[1][0]}/epoch_0001.pdparams', '-device=cpu',
                      f'-data_path={list_dataset}', f'-output={tmp_path}/run')
    assert done.returncode == 0, done.stderr
    assert 'has 3 steps, which with this global batch correspond to 2' in done.stdout
    records = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    record = next(r for r in records if r['event'] == 'train')
    assert (record['epoch'], record['step']) == (2, 4)
    assert record['lr'] == Schedule(base_lr=1e-2, start_lr=1e-6, end_lr=1e-6, warmup_steps=2, total_steps=4)(3)


def test_an_older_checkpoint_or_an_evaluation_never_writes_into_the_run(trained, run_script, list_dataset):
    folder, _ = trained[1]
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    for flags in ([f'-resume={folder}/epoch_0001.pdparams'], ['-eval', f'-resume={folder}']):
        done = run_script('main_single_gpu.py', *flags, f'-output={folder}', f'-data_path={list_dataset}')
        assert done.returncode == 2 and 'already contains a run' in done.stderr
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_training_without_mixup_and_with_the_other_options(run_script, list_dataset, tiny_yaml, tmp_path):
    """Both alphas 0, as in the fine-tuning recipes, layer-wise decay, clipping, recomputation, no EMA."""
    done = run_script('main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', f'-output={tmp_path}/run',
                      '-device=cpu', '-amp', '-num_workers=1', '-opts', 'TRAIN.MIXUP_PROB', '0',
                      'TRAIN.MIXUP_ALPHA', '0', 'TRAIN.CUTMIX_ALPHA', '0', 'TRAIN.LAYER_DECAY', '0.7',
                      'TRAIN.GRAD_CLIP', '1.0', 'MODEL.RECOMPUTE', 'True', 'TRAIN.MODEL_EMA', 'False',
                      'TRAIN.NUM_EPOCHS', '1')
    assert done.returncode == 0, done.stderr
    assert len(re.findall('^.{14} -amp: ', done.stdout, re.M)) == 1  # by one of the ranks
    assert len(LINE.findall(done.stdout)) == 1 and not (tmp_path / 'run/best_ema.pdparams').exists()


@pytest.mark.parametrize(('count', 'opts'), [
    (2, 'TRAIN.LOSS jsd TRAIN.MIXUP_PROB 0 TRAIN.AUG_SPLITS 3 TRAIN.AUTO_AUGMENT augmix-m3-w3 TRAIN.REPEATED_AUG 3'),
    (1, 'TRAIN.LOSS bce TRAIN.BCE_THRESHOLD 0.2 TRAIN.AUTO_AUGMENT original-mstd0.5 TRAIN.REPEATED_AUG 2'),
])
def test_training_with_other_losses_and_augmentations(run_script, list_dataset, tiny_yaml, tmp_path, count, opts):
    done = run_script('main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', f'-output={tmp_path}/run',
                      '-device=cpu', '-nprocs', count, '-opts', *opts.split(), 'TRAIN.NUM_EPOCHS', '1')
    assert done.returncode == 0, done.stderr
    records = map(json.loads, (tmp_path / 'run/metrics.jsonl').read_text().splitlines())
    trained, *evaluated = [record for record in records if record['event'] != 'step']
    assert trained['images'] == 12 and 0 < trained['loss'] < 10
    assert [record['images'] for record in evaluated] == [11, 11]


@pytest.mark.parametrize('name', [pytest.param('SIGTERM', marks=pytest.mark.long), 'SIGINT', 'SIGKILL'])
def test_no_process_outlives_the_one_that_started_it(list_dataset, tiny_yaml, tmp_path, name):
    process = subprocess.Popen(
        [sys.executable, f'{ROOT}/main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}',
         f'-output={tmp_path}/run', '-device=cpu', '-opts', 'TRAIN.NUM_EPOCHS', '100000'],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # a test suite in the background of a shell ignores SIGINT, which its children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert any('epoch 1' in line for line in process.stdout), process.communicate()[1]
    if name == 'SIGINT':
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    else:
        process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)  # returns once the last process has closed its end of the pipes
    assert process.returncode == {'SIGTERM': 143, 'SIGINT': 130, 'SIGKILL': -9}[name]
    if name != 'SIGKILL':  # after it, a rank may notice that the other is gone before it notices that the parent is
        assert re.fullmatch(r'(stopped by a signal.*\n)?', errors)  # outside of training nothing is printed


@pytest.mark.parametrize(('flags', 'words'), [
    (['-last_epoch=2', '-opts', 'TRAIN.NUM_EPOCHS', '3'], 'the checkpoint is of epoch 1, but -last_epoch is 2'),
    (['-opts', 'MODEL.CHANNELS', '[4,6,8,12]'], 'MODEL.CHANNELS [4, 6, 8, 10] -> [4, 6, 8, 12]'),
    (['-opts', 'TRAIN.NUM_EPOCHS', '1'], 'all 1 epochs are done')])
def test_a_checkpoint_that_does_not_fit_is_not_resumed(trained, run_script, list_dataset, tmp_path, flags, words):
    done = run_script('main_single_gpu.py', f'-resume={trained[1][0]}/epoch_0001.pdparams', '-device=cpu',
                      f'-data_path={list_dataset}', f'-output={tmp_path}/run', *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_fine_tuning_to_other_classes_drops_the_head_and_logs_it(trained, run_script, list_dataset, tmp_path):
    flags = [f'-pretrained={trained[1][0]}/best.pdparams', f'-data_path={list_dataset}', '-device=cpu']
    classes = ['-opts', 'MODEL.NUM_CLASSES', '6', 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.MIXUP_PROB', '0']
    done = run_script('main_single_gpu.py', *flags, f'-output={tmp_path}/run', *classes)
    assert done.returncode == 0, done.stderr
    assert 'head of 4 classes is dropped' in done.stdout
    done = run_script('main_single_gpu.py', *flags, '-eval', *classes)
    assert done.returncode == 2 and 'head.weight' in done.stderr
