# Finds or creates the Python environment. The other scripts source this file:  . ./setup_env.sh
#
# It sets $PYTHON to the interpreter of the active environment if that has paddle, otherwise to that of .venv, which is
# created on first use from requirements.txt, and with dev=1 from requirements-dev.txt as well.
# Run by itself (sh setup_env.sh), it only prepares the environment.
root=${root:-$(cd "$(dirname "$0")" && pwd)}

missing_modules() {  # arguments: interpreter, module names; prints the modules that it cannot find
    interpreter=$1
    shift
    "$interpreter" - "$@" <<'PYTHON_END'
import sys
from importlib.util import find_spec
sys.path = [path for path in sys.path if path]  # a folder named paddle here is not Paddle
print(' '.join(name for name in sys.argv[1:] if find_spec(name) is None))
PYTHON_END
}

PYTHON=
for candidate in python python3; do
    if command -v "$candidate" >/dev/null 2>&1 && [ -z "$(missing_modules "$candidate" paddle 2>/dev/null || echo no)" ]
    then
        PYTHON=$candidate
        break
    fi
done
if [ -n "$PYTHON" ]; then
    missing=$(missing_modules "$PYTHON" numpy yaml yacs PIL tqdm setuptools ${dev:+pytest xdist ruff sklearn safetensors})
    if [ -n "$missing" ]; then
        echo "setup_env.sh: the active environment has paddle but not: $missing; install them with:" \
             "$PYTHON -m pip install -r '$root/requirements-gpu.txt'${dev:+ -r '$root/requirements-dev.txt'}" >&2
        exit 2
    fi
else
    if ! command -v python3 >/dev/null 2>&1; then
        echo "setup_env.sh: python3 was not found; install Python 3.9 to 3.13" >&2
        exit 2
    fi
    # a kernel lock, which is released however its process ends
    python3 - "$root" "$(command -v python3)" ${dev:+requirements-dev.txt} <<'PYTHON_END' || exit $?
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys

root, python, *more = sys.argv[1:]
os.chdir(root)
files = ['requirements.txt', *more]
# stamps are written last, so that an interrupted installation is repeated
stamps = {f'.venv/installed-{name}': hashlib.sha256(open(name, 'rb').read()).hexdigest() for name in files}


def installed():
    return os.access('.venv/bin/python', os.X_OK) and all(
        os.path.exists(path) and open(path).read() == digest for path, digest in stamps.items())


def run(command, advice):
    if subprocess.call(command):
        sys.exit(f'setup_env.sh: {advice}')


def warn_of_unused_gpus():
    """The same cards as utils.unused_gpus, which warns when the environment is used."""
    folder = os.environ.get('nvidia_cards', '/proc/driver/nvidia/gpus')
    if os.path.isdir(folder):
        found = bool(os.listdir(folder))
    else:
        found = bool(shutil.which('nvidia-smi')) and b'GPU ' in subprocess.run(['nvidia-smi', '-L'],
                                                                               stdout=subprocess.PIPE).stdout
    if found and os.environ.get('CUDA_VISIBLE_DEVICES') not in ('', '-1'):
        print('setup_env.sh: this machine has an NVIDIA card, but .venv gets the build of Paddle for CPUs; for GPUs, stop '
              'this, activate an environment of your own and install in it:', file=sys.stderr)
        with open('requirements-gpu.txt') as file:
            print(*(line.lstrip('# ').rstrip() for line in file if 'pip install paddlepaddle-gpu' in line),
                  sep='\n', file=sys.stderr, flush=True)


def main():
    if installed():
        return
    try:
        lock = open('.venv.lock', 'w')
    except OSError as error:
        sys.exit(f'setup_env.sh: {root} is not writable ({error.strerror}); activate an environment that has paddle')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f'waiting for another process that is setting up {root}/.venv', file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    if installed():
        return
    warn_of_unused_gpus()
    print(f'setting up {root}/.venv: a few minutes and about 1.1 GB, once', file=sys.stderr, flush=True)
    run([python, '-m', 'venv', '.venv'],
        'python3 -m venv failed, see above; it requires the venv module (Debian: apt install python3-venv)')
    run(['.venv/bin/python', '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check',
         *(part for name in files for part in ('-r', name))],
        'pip could not install the requirements, see above; run the command again to continue')
    for path, digest in stamps.items():
        with open(path, 'w') as file:
            file.write(digest)


try:
    main()
except KeyboardInterrupt:
    sys.exit(130)
except SystemExit as stop:
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
        sys.exit(2)
    raise
PYTHON_END
    PYTHON="$root/.venv/bin/python"
fi
export PYTHON
