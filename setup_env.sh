# Finds or makes the Python environment; the other scripts read it in:  . ./setup_env.sh
#
# Sets $PYTHON to the interpreter of the active environment when that has paddle, else to that of .venv, which is made
# on first use from requirements.txt. With dev=1 set before, requirements-dev.txt belongs to it.
# Run by itself (sh setup_env.sh) it only prepares the environment.
root=${root:-$(cd "$(dirname "$0")" && pwd)}

has_modules() {  # interpreter, modules: prints those that are missing
    "$1" - $2 <<'PYTHON_END'
import sys
from importlib.util import find_spec
print(' '.join(name for name in sys.argv[1:] if find_spec(name) is None))
PYTHON_END
}

modules="numpy yaml yacs PIL tqdm setuptools"
[ -z "$dev" ] || modules="$modules pytest sklearn safetensors"
PYTHON=
for candidate in python python3; do
    # an active environment, or a system-wide install of paddle
    if command -v "$candidate" >/dev/null 2>&1 && [ -z "$(has_modules "$candidate" paddle 2>/dev/null || echo no)" ]; then
        PYTHON=$candidate
        break
    fi
done
if [ -n "$PYTHON" ]; then
    missing=$(has_modules "$PYTHON" "$modules")
    if [ -n "$missing" ]; then
        echo "setup_env.sh: the active environment has paddle but not: $missing;" \
             "install them with: $PYTHON -m pip install -r $root/requirements-gpu.txt${dev:+ -r $root/requirements-dev.txt}" >&2
        exit 2
    fi
else
    requirements="$root/requirements.txt ${dev:+$root/requirements-dev.txt}"
    stamp="$root/.venv/installed$dev"
    # the stamp is written last, so an installation that was cut off is done again
    if [ "$(cat $requirements | cksum)" != "$(cat "$stamp" 2>/dev/null)" ]; then
        until mkdir "$root/.venv.lock" 2>/dev/null; do  # two scripts at once: the second one waits
            if [ -n "$(find "$root/.venv.lock" -prune -mmin +30 2>/dev/null)" ]; then
                rmdir "$root/.venv.lock" 2>/dev/null || true
            elif [ ! -w "$root" ]; then
                echo "setup_env.sh: $root cannot be written; activate an environment that has paddle" >&2
                exit 2
            fi
            sleep 1
        done
        trap 'rmdir "$root/.venv.lock" 2>/dev/null' EXIT
        trap 'exit 130' INT TERM
        if [ "$(cat $requirements | cksum)" != "$(cat "$stamp" 2>/dev/null)" ]; then
            echo "setting up $root/.venv: some minutes and about 1 GB, once" >&2
            python3 -m venv "$root/.venv" || {
                echo "setup_env.sh: python3 -m venv failed; install Python 3.9 to 3.13 with its venv module" \
                     "(Debian: apt install python3-venv)" >&2
                exit 2
            }
            "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
                $(for file in $requirements; do printf -- '-r %s ' "$file"; done) || {
                echo "setup_env.sh: pip could not install requirements.txt, see above; run the command again to go on" >&2
                exit 2
            }
            cat $requirements | cksum > "$stamp"
        fi
        rmdir "$root/.venv.lock"
        trap - EXIT INT TERM
    fi
    PYTHON="$root/.venv/bin/python"
fi
export PYTHON
