"""Fills the emulated machine with Python, its packages, this project and its operator: `paddle_guest.py GUEST FLAGS
FLAGS`, where FLAGS choose the processor for which the operator is compiled, with AMX and without it.
"""
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from large_kernel import build  # noqa: E402

# Not those that start other processes, whose operator would have to be compiled in the emulated machine. See run.sh
# about int8.
TESTS = 'not resumes and not the_commands and not benchmark and not onnx'
RUN = """
cd {root}
export HOME=/tmp LD_PRELOAD=/permit_amx.so PYTHONDONTWRITEBYTECODE=1
run() {{
    {python} -c "
import sys
from large_kernel import build
build.load_operator(sys.argv[1])
print(sys.argv[1], build.instructions('bf16'), build.instructions('int8'))
import pytest
sys.exit(pytest.main(['-v', '--tb=short', '-p', 'no:cacheprovider', *sys.argv[2:]]))
" "$@"
}}
run /with_amx.so tests/test_products.py tests/test_precision.py -k '{tests} and not int8' &&
run /without_amx.so tests/test_products.py tests/test_precision.py -k '{tests}'
"""


def copy(source, guest):
    """Copies a file or folder to the same path below `guest`; links stay links."""
    target = guest / source.relative_to('/')
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns('test', '*.a'))
    else:
        shutil.copy2(source, target)


def libraries(files):
    """Paths of the shared libraries that `files` need."""
    found = set()
    for start in range(0, len(files), 200):
        lines = subprocess.run(['ldd', *files[start:start + 200]], capture_output=True, text=True).stdout
        found |= set(re.findall(r'^\t(?:\S+ => )?(/\S+) \(0x', lines, re.M))
    return found


def compile_operator(flags, library):
    """Compiles the operator for the processor that `flags` choose."""
    own = build._flags
    build._flags = lambda: [*(flag for flag in own() if flag != '-march=native'), *flags.split()]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for command in build._commands(build._compiler(), folder, library):
                subprocess.run(command, check=True)
    finally:
        build._flags = own


def main(guest, *flags):
    guest = Path(guest).resolve()
    python, packages = Path(sys.executable), {Path(sysconfig.get_path(name)) for name in ('purelib', 'platlib')}
    for folder in (Path(sysconfig.get_path('stdlib')), *packages):
        copy(folder, guest)
    copy(python.resolve(), guest)
    if python.is_symlink():  # a virtual environment
        (guest / python.relative_to('/')).parent.mkdir(parents=True, exist_ok=True)
        (guest / python.relative_to('/')).symlink_to(python.resolve())
        copy(Path(sys.prefix) / 'pyvenv.cfg', guest)
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.strip('\0').split('\0'):
        copy(ROOT / name, guest)
    for name, chosen in zip(('with_amx', 'without_amx'), flags):
        compile_operator(chosen, guest / f'{name}.so')
    for library in libraries([str(python), *map(str, guest.rglob('*.so*'))]):
        if Path(library).is_relative_to(guest):
            continue
        target = guest / library.lstrip('/')
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(library, target)
    (guest / 'run.sh').write_text(RUN.format(root=ROOT, python=python, tests=TESTS))


if __name__ == '__main__':
    main(*sys.argv[1:])
