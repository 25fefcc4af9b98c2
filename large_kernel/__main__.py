"""`python -m large_kernel` builds the C++ operator in advance and prints which implementation will be used, and why."""
import os
import sys

import paddle_env
from errors import UserError, exit_status
from large_kernel import build, conv


def main():
    name = os.environ.get(conv.VARIABLE) or 'auto'
    if name not in conv.IMPLEMENTATIONS:
        raise UserError(f'{conv.VARIABLE}={name}: expected one of {", ".join(conv.IMPLEMENTATIONS)}')
    reason = build.reason_unavailable()
    print(f'C++ operator: {build.load_operator() if reason is None else "not available: " + reason}')
    if name != 'auto':
        print(f'will be used: {name}, because of {conv.VARIABLE}')
    elif reason is None:
        print('will be used: custom on the CPU; on other devices the faster of fft and native, measured for each shape')
    else:
        print('will be used: the faster of fft and native, measured for each shape')
    print(f'environment: {paddle_env.describe()}')
    return 2 if name == 'custom' and reason else 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
