"""What the main scripts share: settings from the command line, processes, and how a run ends."""
import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import time

import paddle_env

import paddle  # isort: skip
import paddle.distributed as dist  # isort: skip

import utils
from config import get_arguments, get_config, update_config
from engine import run
from errors import TrainingStopped, UserError
from run_folder import RunFolder, config_beside, default_folder

# the first process to report a mistake that all of them made makes this file, so that it is printed once
_REPORTED = 'REPLKNET_ERROR_REPORTED'


def read_settings(description, argv=None):
    """Frozen settings and the kind of device from the command line.

    Without -cfg the settings are those beside the checkpoint that -resume or -pretrained names.
    """
    args = get_arguments(description, argv)
    args.cfg = args.cfg or config_beside(args.resume or args.pretrained or '')
    if not args.cfg:
        raise UserError('-cfg is missing: name a file of settings, such as -cfg=./configs/replknet_31b.yaml')
    config = update_config(get_config(args.cfg, args.opts), args)
    if not config.SAVE and not config.EVAL:
        config.SAVE = default_folder(config)
    config.freeze()
    if config.SAVE:
        RunFolder(config)  # refuses another run's folder before any process starts
    return config, utils.resolve_device(config.DEVICE)


def exit_status(function, *args):
    """Calls `function`; a mistake of the user's becomes one line on standard error and status 2.

    Returns:
        0, 1 (training had to stop), 2 (a mistake) or 130 (interrupted).
    """
    try:
        function(*args)
        return 0
    except (UserError, FileNotFoundError) as error:
        status, message = 2, str(error)
    except TrainingStopped as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, 'interrupted'
    if _first_to_report():
        print(message, file=sys.stderr, flush=True)
    return status


def _first_to_report():
    marker = os.environ.get(_REPORTED)
    if not marker:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        return True
    except OSError:
        return False


def run_in_this_process(config, device):
    """One process of a run; of several when Paddle's launcher or `run_in_processes` has started it."""
    launched = int(os.environ.get('PADDLE_TRAINERS_NUM', '1')) > 1
    if launched:
        with contextlib.redirect_stderr(io.StringIO()):  # Paddle lists its own flags there
            dist.init_parallel_env()
    local = int(os.environ.get('PADDLE_LOCAL_SIZE', dist.get_world_size()))
    threads = paddle_env.set_threads(processes=local) if device == 'cpu' else 0
    paddle.set_device('cpu' if device == 'cpu' else f'{device}:{dist.ParallelEnv().device_id}')
    utils.setup_logging(verbose=utils.is_main())
    utils.logger.info(f'Paddle {paddle.__version__} on {device}' + (
        f', {threads} threads a process; {paddle_env.describe()}' if device == 'cpu' else ''))
    run(config, device)


def run_in_processes(config, device):
    """Starts the processes of a run on this machine and waits for them; returns the exit status."""
    count = config.NPROCS or (2 if device == 'cpu' else utils.device_count(device))
    if device != 'cpu' and count > utils.device_count(device):
        raise UserError(f'-nprocs={count}: there are {utils.device_count(device)} {device} devices here')
    if count == 1:
        return exit_status(run_in_this_process, config, device)
    with tempfile.TemporaryDirectory() as folder:
        logging.getLogger().setLevel(logging.WARNING)  # Paddle tells there which ports it found
        os.environ[_REPORTED] = os.path.join(folder, 'reported')
        options = {'backend': 'gloo'} if device == 'cpu' else {}
        context = dist.spawn(_child, (config, device), nprocs=count, join=False, **options)
        return _wait(context.processes)


def _child(config, device):
    sys.exit(exit_status(run_in_this_process, config, device))


def _wait(processes):
    """Waits for all; when one fails the others, which may wait for it, are stopped. Returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        failed = []
        while not failed and any(p.exitcode is None for p in processes):
            time.sleep(0.1)
            failed = [(rank, p.exitcode) for rank, p in enumerate(processes) if p.exitcode]
    except KeyboardInterrupt:
        return 130
    finally:
        _stop(processes)  # also when this process is told to end
    if not failed:
        return 0
    rank, code = failed[0]
    if code not in (1, 2, 130):  # these have said why
        print(f'process {rank} ended with {"signal" if code < 0 else "status"} {abs(code)}; the others were stopped',
              file=sys.stderr, flush=True)
    return code if code > 0 else 1


def _stop(processes, patience=5):
    """Lets the processes end by themselves for some seconds, as they do after an error of all, then ends them."""
    deadline = time.monotonic() + patience
    for end in ('terminate', 'kill'):
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                getattr(process, end)()
        deadline = time.monotonic() + patience
