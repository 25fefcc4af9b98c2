"""`python -m large_kernel` builds the operators in advance and prints what each device will use, and why."""
import os
import sys

import paddle_env
from errors import UserError, exit_status
from large_kernel import build, conv, cuda


def main():
    name = os.environ.get(conv.VARIABLE) or 'auto'
    if name not in conv.IMPLEMENTATIONS:
        raise UserError(f'{conv.VARIABLE}={name}: expected one of {", ".join(conv.IMPLEMENTATIONS)}')
    reason = build.reason_unavailable()
    print(f'C++ operator: {build.load_operator() if reason is None else "not available: " + reason}')
    for precision, name_of in (('bf16', 'bfloat16'), ('int8', 'int8')) if reason is None else ():
        print(f'products in {name_of}: {build.instructions(precision) or "emulated, slower than float32"}')
    gpus = cuda.count()
    reasons = [cuda.reason_unavailable(device) for device in range(gpus)]
    for device, why in enumerate(reasons or [cuda.reason_unavailable()]):
        print(f'CUDA operator{f" on gpu:{device}" if gpus else ""}: '
              f'{"ready" if why is None else "not available: " + why}')
    if name not in ('auto', 'custom'):
        print(f'will be used: {name}, because of {conv.VARIABLE}')
    else:
        slow = 'the faster of fft and native, measured for each shape'
        print(f'will be used on the CPU: {"custom" if reason is None else slow}')
        for device, why in enumerate(reasons):
            print(f'will be used on gpu:{device}: '
                  f'{f"cuda from 5x5 on at stride 1; otherwise {slow}" if why is None else slow}')
    print(f'environment: {paddle_env.describe()}')
    return 2 if name == 'custom' and (all(reasons) if reasons else reason) else 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
