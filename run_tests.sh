#!/bin/sh
# Runs the tests; arguments go to pytest: sh run_tests.sh -k mixup, or --long for those that take minutes. Two files at a
# time, since most tests keep one core busy; -n 0 runs them in one process, as --pdb needs.
set -e
root=$(cd "$(dirname "$0")" && pwd)
dev=1
. "$root/setup_env.sh"
cd "$root"
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
