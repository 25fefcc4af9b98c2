#!/bin/sh
# Runs the tests. Arguments are passed to pytest: sh run_tests.sh -k mixup, or --long to include tests that take minutes.
# Two files run at a time, since most tests use one core; -n 0 runs everything in one process, as --pdb requires.
set -e
root=$(cd "$(dirname "$0")" && pwd)
dev=1
. "$root/setup_env.sh"
cd "$root"
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
