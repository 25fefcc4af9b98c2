"""Shared by the main scripts: reads the settings, starts the processes of a run and waits for them to end."""
import atexit
import contextlib
import ctypes
import io
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import resource_tracker

import paddle_env

import paddle  # isort: skip
import paddle.distributed as dist  # isort: skip
import utils
from config import get_arguments, get_config
from dry_run.likely_mistakes import warnings_of_a_run
from dry_run.plan import make_plan, planned_device
from dry_run.report import report
from errors import REPORTED, UserError, exit_status, first_to_report
from large_kernel.conv import IMPLEMENTATIONS, VARIABLE
from run_folder.resume import choose_folder, remove_unused_folder
from training.peers import watched
from training.run import run
from training.signals import STOP_SECONDS, end_with_parent, stop
from zoo import require_settings_file


def read_settings(description, argv=None):
    """The settings and the device that a command line chooses.

    Without -cfg, the settings belong to what -resume or -pretrained names: those of the zoo for the name of a model,
    or the config.yaml next to a checkpoint.

    Args:
        description: help text of the script.
        argv: arguments; None for those of this process.
    Returns:
        frozen settings, and the kind of device ('gpu', 'cpu', ...).
    Raises:
        UserError: the command line, the settings or the environment is wrong.
    """
    args = get_arguments(description, argv)
    if args.flags['pretrained'] and args.flags['resume'] not in (None, 'auto'):
        raise UserError('-pretrained and -resume exclude each other: a resumed run has the weights of its checkpoint; '
                        'to start a new run from other weights, give -pretrained only')
    resume = args.flags['resume'] if args.flags['resume'] != 'auto' else args.flags['output']
    config = get_config(require_settings_file(args.cfg, resume or args.flags['pretrained']), args.opts, args.flags)
    implementation = os.environ.get(VARIABLE) or 'auto'
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f'{VARIABLE}={implementation}: choose from {", ".join(IMPLEMENTATIONS)}')
    device = planned_device(config) if config.DRY_RUN else utils.resolve_device(config.DEVICE, config.AMP)
    choose_folder(config)  # refuses the folder of another run before any process starts
    config.freeze()
    return config, device


def run_in_this_process(config, device, ready=lambda cure: None):
    """Runs the settings in this process, which may be one of several that `run_in_processes` or Paddle started.

    Args:
        config: frozen settings.
        device: kind of device.
        ready: called when the ranks have found each other; see `peers.watched`.
    """
    processes = int(os.environ.get('PADDLE_TRAINERS_NUM', '1'))
    if config.DRY_RUN:
        if os.environ.get('PADDLE_TRAINER_ID', '0') == '0':
            print(report(config, device, processes))
        return
    if processes > 1:
        os.environ.setdefault('FLAGS_stop_check_timeout', str(24 * 3600))  # longest wait for another process
        if device == 'cpu':
            os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'  # on a machine with GPUs, Paddle would choose nccl
        with contextlib.redirect_stderr(io.StringIO()):  # Paddle prints its flags there
            dist.init_parallel_env()
        ready(f'start again with -resume={config.SAVE} to continue' if config.SAVE and not config.EVAL else
              'start the run again')
    local = int(os.environ.get('PADDLE_LOCAL_SIZE', dist.get_world_size()))
    threads = paddle_env.set_threads(processes=local) if device == 'cpu' else 0
    paddle.set_device('cpu' if device == 'cpu' else f'{device}:{dist.ParallelEnv().device_id}')
    utils.setup_logging(verbose=utils.is_main())
    utils.logger.info(f'Paddle {paddle.__version__} on {device}' + (
        f', threads per process: {threads}; {paddle_env.describe()}' if device == 'cpu' else ''))
    if utils.is_main():
        for line in warnings_of_a_run(make_plan(config, device, dist.get_world_size())):
            utils.logger.warning(f'likely a mistake: {line}')
    run(config, device)


def run_in_processes(config, device):
    """Starts the processes of a run on this machine and waits for them.

    Returns:
        the exit status.
    Raises:
        UserError: this machine does not have that many devices.
    """
    count = config.NPROCS or (2 if device == 'cpu' else utils.device_count(device))
    if config.DRY_RUN:
        print(report(config, device, max(1, count)))
        return 0
    if device != 'cpu' and count > utils.device_count(device):
        raise UserError(f'-nprocs={count}: this machine has {utils.device_count(device)} {device} devices')
    if count == 1:
        return exit_status(run_in_this_process, config, device)
    utils.require_locks('or run main_single_gpu.py with -num_workers=0')
    with tempfile.TemporaryDirectory() as folder:
        logging.getLogger().setLevel(logging.WARNING)  # Paddle logs the ports it found
        os.environ[REPORTED] = os.path.join(folder, 'reported')
        options = {'backend': 'gloo'} if device == 'cpu' else {}
        paddle_env.prepare_ranks()
        resource_tracker.ensure_running()  # see `deferred`; the ranks must start with the signals blocked
        try:
            with stop.deferred():  # a signal sets the exit status once the ranks, which report it, have ended
                context = dist.spawn(_child, (config, device), nprocs=count, join=False, **options)
                return _wait(context.processes)
        finally:
            if os.path.exists(os.environ[REPORTED]):
                os.environ[REPORTED] = os.devnull  # still exists when the folder is gone: nothing is reported twice


def _child(config, device):
    end_with_parent(multiprocessing.parent_process().pid)
    stop.listen(signal.SIGTERM)  # Ctrl-C reaches all processes of a terminal; the parent handles it
    # back to the platform's default: a spawned process spawns its children, too, and every DataLoader worker would
    # import Paddle, in every epoch
    multiprocessing.set_start_method(None, force=True)
    end_process(exit_status(_run_rank, lambda: (config, device)))


def end_process(status):
    """Ends this process with a status. If it is one of several ranks, C++'s destructors do not run.

    While they run, Paddle's threads still serve the other ranks; in rank 0, that is the store in which the ranks found
    each other. If another rank closes its connection at that moment, such a thread uses what has been destroyed, and
    signal 11 or 6 ends a rank that has finished its work.
    """
    if dist.is_initialized():
        try:  # as the interpreter does at its end: waits for threads, then calls the functions registered with atexit
            threading._shutdown()
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or its reader is gone
                    stream.flush()
            ctypes.CDLL(None).fflush(None)
        finally:
            os._exit(status)
    sys.exit(status)


def _run_rank(settings):
    """Runs one of several ranks; `settings` returns the arguments of `run_in_this_process`."""
    environment = dist.ParallelEnv()
    _check_addresses(environment.trainer_endpoints)
    with watched(environment.rank, environment.trainer_endpoints) as ready:
        run_in_this_process(*settings(), ready)


def _check_addresses(endpoints):
    """Refuses addresses some of which mean only the machine itself: Debian resolves a host name to 127.0.1.1."""
    local = [(rank, endpoint.split(':')[0]) for rank, endpoint in enumerate(endpoints) if endpoint.startswith('127.')]
    if local and len(local) < len(endpoints):
        rank, address = local[0]
        raise UserError(f'the machine of rank {rank} resolves its own name to {address}, which other machines cannot '
                        'reach: give the name its real address in /etc/hosts there')


def _wait(processes):
    """Waits for the processes, and passes a stop signal on: they then agree on a step after which to stop.

    When one fails, the others, which may be waiting for it, are stopped.

    Returns:
        the exit status.
    """
    ended = {}
    while not any(ended.values()) and len(ended) < len(processes) and not stop.received:
        time.sleep(0.1)
        ended = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode is not None}
    if stop.received:
        for process in processes:
            process.terminate()
    for rank, code in ended.items():  # the process has printed the reason for these, or its signal was meant for all
        if code not in (0, 1, 2, 143, -signal.SIGTERM) and not stop.received and first_to_report():
            print(f'process {rank} ended with {"signal" if code < 0 else "status"} {abs(code)}; '
                  'the others were stopped', file=sys.stderr, flush=True)
    # after a signal they finish their step, but this process must have killed those that hang before its own time is
    # up; otherwise they only need to end by themselves, as they do when all of them report the same mistake
    _stop(processes, STOP_SECONDS - 7 if stop.received else 5)
    codes = {p.exitcode for p in processes}
    return 0 if codes == {0} else 143 if {143, -signal.SIGTERM} & set(ended.values()) else 2 if 2 in codes else 1


def _stop(processes, patience):
    """Gives the processes `patience` seconds to end by themselves, then terminates and finally kills them."""
    for end in ('terminate', 'kill'):
        deadline = time.monotonic() + patience
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                getattr(process, end)()
        patience = 2  # a second SIGTERM ends a process at once, unless it hangs in a call that blocks all threads
    for process in processes:
        process.join()


def run_single(description):
    """Trains or evaluates in this process, according to the command line."""
    try:
        run_in_this_process(*read_settings(description))
    finally:
        remove_unused_folder()


def run_multi(description):
    """Trains or evaluates with one process per device, according to the command line."""
    try:
        if 'PADDLE_TRAINER_ID' in os.environ:  # Paddle's launcher started this process
            return _run_rank(lambda: read_settings(description))
        return run_in_processes(*read_settings(description))
    finally:
        remove_unused_folder()
