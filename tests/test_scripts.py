"""The shell scripts, in a copy of the project whose path contains a space."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp('a copy') / 'replknet'
    left_out = shutil.ignore_patterns('.git', '.venv*', 'data', 'output', 'weights', '__pycache__', 'tests', '.*_cache')
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def sh(project, script, *args, path=None, timeout=600):
    """Runs a script from another folder, with the interpreter of this test as the active environment."""
    env = {**os.environ, 'PATH': path or f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    return subprocess.run(['sh', str(project / script), *args], capture_output=True, text=True, env=env, cwd='/',
                          timeout=timeout, stdin=subprocess.DEVNULL)


def stub_python(folder, body):
    """Makes a folder for PATH whose only Python interpreter is a shell script with the given body."""
    folder.mkdir()
    for tool in ('sh', 'cat', 'cksum', 'dirname', 'mkdir', 'rmdir', 'sleep', 'find', 'rm', 'kill'):
        (folder / tool).symlink_to(shutil.which(tool))
    (folder / 'python3').write_text(f'#!{shutil.which("sh")}\n{body}\n')
    (folder / 'python3').chmod(0o755)
    return str(folder)


def test_arguments_are_passed_to_the_main_script(project):
    done = sh(project, 'run_train_multi.sh', '-cfg=no such.yaml')
    assert done.returncode == 2 and done.stderr == 'no such.yaml: no such config file\n'
    done = sh(project, 'run_eval_multi.sh', f'-cfg={project}/configs/replknet_31b.yaml', '-device=cpu', '-nprocs=1')
    assert done.returncode == 2 and '-eval needs weights' in done.stderr
    assert not (project / '.venv').exists()  # the active environment has paddle


def test_evaluation_before_the_demo_names_the_script_to_run_first(project):
    done = sh(project, 'run_eval_multi.sh')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'run_train_multi.sh first' in done.stderr


def test_an_environment_with_paddle_but_without_the_rest_names_what_is_missing(project, tmp_path):
    body = 'case "$*" in "- paddle") ;; *) echo yacs tqdm ;; esac'
    done = sh(project, 'setup_env.sh', path=stub_python(tmp_path / 'bin', body))
    assert done.returncode == 2
    assert 'has paddle but not: yacs tqdm' in done.stderr and done.stderr.count('\n') == 1
    assert not (project / '.venv').exists()


REAL = f'exec "{sys.executable}" "$@"'


@pytest.mark.parametrize(('venv', 'words'), [
    ('exit 1', 'python3 -m venv failed'),
    ('mkdir -p "$3/bin"; printf "#!/bin/sh\\nexit 1\\n" > "$3/bin/python"; /bin/chmod +x "$3/bin/python"',
     'pip could not install')])
def test_a_setup_that_fails_says_why_and_can_be_run_again(project, tmp_path, venv, words):
    body = f'case "$*" in "- paddle") echo paddle ;; "-m venv"*) {venv} ;; *) {REAL} ;; esac'
    for _ in range(2):
        done = sh(project, 'setup_env.sh', path=stub_python(tmp_path / 'bin', body), timeout=30)
        assert done.returncode == 2 and words in done.stderr
        assert done.stderr.startswith('setting up') and done.stderr.count('\n') == 2
        shutil.rmtree(tmp_path / 'bin')
    shutil.rmtree(project / '.venv', ignore_errors=True)


def test_a_setup_on_a_machine_with_a_card_names_the_environment_for_it(project, tmp_path, monkeypatch):
    body = f'case "$*" in "- paddle") echo paddle ;; "-m venv"*) exit 1 ;; *) {REAL} ;; esac'
    (tmp_path / 'gpus/0000:00:1e.0').mkdir(parents=True)
    monkeypatch.setenv('nvidia_cards', str(tmp_path / 'gpus'))
    path = stub_python(tmp_path / 'bin', body)
    assert 'NVIDIA' not in sh(project, 'setup_env.sh', path=path).stderr  # conftest hides the cards
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    warned = sh(project, 'setup_env.sh', path=path).stderr
    assert 'this machine has an NVIDIA card' in warned and warned.count('pip install paddlepaddle-gpu==') == 2
    shutil.rmtree(project / '.venv', ignore_errors=True)


@pytest.mark.parametrize(('epochs', 'accuracy'), [(2, 25), pytest.param(25, 97, marks=pytest.mark.long)])
def test_the_demo_reaches_its_accuracy_and_evaluation_confirms_it(project, epochs, accuracy):
    settings = project / 'configs/replknet_nano_digits.yaml'
    settings.write_text(re.sub(r'NUM_EPOCHS: \d+', f'NUM_EPOCHS: {epochs}', settings.read_text()))
    done = sh(project, 'run_train_multi.sh')
    assert done.returncode == 0, done.stderr
    best = re.search(r'best model: epoch \d+ (Acc@1 (\S+) Acc@5 \S+) in (output/\S+)/best.pdparams', done.stdout)
    assert best and float(best[2]) >= accuracy
    assert f'run folder {best[3]}' in ' '.join(done.stdout.splitlines()[-2:])  # a line about the curves may follow
    again = sh(project, 'run_eval_multi.sh')
    assert again.returncode == 0, again.stderr
    assert re.fullmatch(f'{re.escape(best[1])} loss \\S+ images 360', again.stdout.splitlines()[-1])
