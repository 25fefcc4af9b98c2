#!/bin/sh
# Runs the tests; arguments go to pytest: sh run_tests.sh -k mixup, or --long for those that take minutes.
set -e
root=$(cd "$(dirname "$0")" && pwd)
dev=1
. "$root/setup_env.sh"
cd "$root"
exec "$PYTHON" -m pytest "$@"
