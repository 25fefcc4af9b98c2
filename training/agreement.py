"""Makes sure at the start of a run that all of its processes have the same settings, data, code and weights.

On several machines each process reads its own command line and files. Processes that differ would compute something
else than asked, wait for each other for ever, or abort in the communication library.
"""
import hashlib
import itertools
import json
import os
import socket
import sys
import zlib
from pathlib import Path

import paddle
from paddle.base.core import create_or_get_global_tcp_store

import utils
from config import KEYS, setting
from errors import UserError
from large_kernel.conv import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
# These may differ from machine to machine; the folders that rank 0 has chosen apply to all.
LOCAL_KEYS = {'DATA.DATA_PATH', 'DATA.NUM_WORKERS', 'MODEL.PRETRAINED', 'MODEL.RESUME', 'SAVE'}
MOST_SHOWN = 4
_calls = itertools.count()  # all processes make the same calls


def agree_on_settings(config, device):
    """Compares the settings and the code of all processes. Every rank calls it.

    Returns:
        the settings, with the run folder and the checkpoint to resume that rank 0 has chosen.
    Raises:
        UserError: processes differ; on all ranks, with the same message.
    """
    if utils.world_size() == 1:
        return config
    facts = {key: repr(setting(config, key)) for key in KEYS if key not in LOCAL_KEYS}
    facts.update({'the kind of device': device, 'the version of Paddle': paddle.__version__,
                  VARIABLE: os.environ.get(VARIABLE) or 'auto', 'the code': _code_digest()})
    first = agree(facts, folders=(config.SAVE, config.MODEL.RESUME))
    config = config.clone()
    config.defrost()
    config.SAVE, config.MODEL.RESUME = first['folders']
    config.freeze()
    return config


def data_facts(data):
    """Facts for `agree` about `data.RunData`."""
    return {data.sources[key]: f"{entry['length']:,} entries, digest {entry['digest'][:12]}"
            for key, entry in data.identity.items()}


def model_facts(model, checkpoint):
    """Facts for `agree` about the initial weights, and about the checkpoint to resume, if there is one."""
    digest = 0
    for tensor in model.state_dict().values():
        digest = zlib.crc32(tensor.numpy(), digest)
    position = f"epoch {checkpoint['epoch']}, step {checkpoint['step']}" if checkpoint else 'none'
    return {'the checkpoint to resume': position, 'the checksum of the initial weights': f'{digest:08x}'}


def agree(facts, problem=None, **more):
    """Compares facts between all processes. Every rank calls it, also one that has met a problem.

    Args:
        facts: {name: value}, both text, which must be the same in all processes.
        problem: why this process cannot go on, in one line, or None.
        more: anything else to hand to the other processes, as JSON.
    Returns:
        what rank 0 has passed: a dict with `facts`, `problem` and the entries of `more`.
    Raises:
        UserError: a process has a problem, or facts differ; on all ranks.
    """
    world, prefix = utils.world_size(), f'replknet/agreement/{next(_calls)}'
    mine = {'host': socket.gethostname(), 'problem': problem, 'facts': facts, **more}
    if world == 1:
        everyone = [mine]
    else:
        store = create_or_get_global_tcp_store()
        store.set(f'{prefix}/{utils.rank()}', json.dumps(mine).encode())
        everyone = [json.loads(bytes(store.get(f'{prefix}/{rank}'))) for rank in range(world)]  # waits for each
    for rank, other in enumerate(everyone):
        if other['problem']:
            raise UserError(other['problem'] if rank == utils.rank() else f'{_name(rank, other)}: {other["problem"]}')
    first = everyone[0]
    for rank, other in enumerate(everyone):
        wrong = [f'{fact} is {other["facts"].get(fact)}, not {value}' for fact, value in first['facts'].items()
                 if other['facts'].get(fact) != value]
        if wrong:
            more_wrong = f' and {len(wrong) - MOST_SHOWN} more' if len(wrong) > MOST_SHOWN else ''
            raise UserError(f'{_name(rank, other)} differs from {_name(0, first)}: {"; ".join(wrong[:MOST_SHOWN])}'
                            f'{more_wrong}; start all machines with the same command, settings, data and code')
    return first


def first_measures(key, measure):
    """The result of `measure`, as JSON, of the process that asks first for `key`; the others wait for it.

    Processes that measure on their own may choose different convolutions, whose gradients are ready in different
    orders: their exchanges would then not match, and wait for ever. It is no collective, since the processes may need
    different shapes.

    Raises:
        RuntimeError: `measure` has failed, in whichever process.
    """
    store, key = create_or_get_global_tcp_store(), f'replknet/measured/{key}'
    if store.add(f'{key}/asked', 1) > 1:
        answer = json.loads(bytes(store.get(key)))
        if 'error' in answer:
            raise RuntimeError(answer['error'])
        return answer['result']
    answer = {'error': 'the process that was to measure the convolutions has ended'}
    try:
        answer = {'result': measure()}
    except RuntimeError as error:
        answer = {'error': str(error)}
        raise
    finally:
        store.set(key, json.dumps(answer).encode())
    return answer['result']


def _name(rank, process):
    return f'rank {rank} on {process["host"]}'


def _code_digest():
    """Digest of the modules of this project that are loaded, and of the sources of its operators."""
    loaded = (getattr(module, '__file__', None) for module in list(sys.modules.values()))
    files = {Path(file).resolve() for file in loaded if file}
    files.update((ROOT / 'large_kernel/csrc').rglob('*.[ch]*'))
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(ROOT), path) for path in files if ROOT in path.parents):
        if not name.parts[0].startswith('.'):  # .venv
            digest.update(f'{name}\n'.encode() + path.read_bytes())
    return f'digest {digest.hexdigest()[:12]}'
