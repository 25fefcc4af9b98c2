"""The layout rules: a room imports only rooms below it, and files and functions stay short.

A room is a folder, or a few modules of the root.
"""
import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the ground up; inference is below training, so it never imports any of it
    {'errors', 'paddle_env', 'atomic_file'},
    {'large_kernel', 'image_files', 'opencv', 'settings'},
    {'config', 'utils'},
    {'replknet', 'drop_path', 'auto_augment', 'transforms', 'datasets', 'loading', 'mixup', 'losses'},
    {'port_weights'},
    {'run_folder'},
    {'zoo', 'fuse'},
    {'dense', 'hubconf', 'checkpoint'},
    {'deploy'},
    {'evaluation'},
    {'serving'},
    {'predict', 'export', 'erf', 'benchmark', 'serve', 'programs'},
    {'training'},
    {'dry_run'},
    {'launcher'},
    {'main_single_gpu', 'main_multi_gpu'},
    {'tools'},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
NOT_ROOMS = {'tests', 'benchmarks', 'docs', 'configs'}


def sources():
    """(room, file) of every Python file outside tests and benchmarks."""
    for path in sorted(ROOT.glob('*.py')):
        yield path.stem, path
    for path in sorted(ROOT.glob('*/*.py')):
        if path.parent.name not in NOT_ROOMS and not path.parent.name.startswith('.'):
            yield path.parent.name, path


def imported(path):
    """Dotted names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ''
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


each_file = pytest.mark.parametrize(('room', 'path'), list(sources()),
                                    ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else '')


@each_file
def test_a_room_imports_only_rooms_below_it(room, path):
    assert room in FLOOR, f'{path.name} has no floor: add its room to FLOORS'
    for other in {module.split('.')[0] for module in imported(path)}:
        if other in FLOOR and not next(names for names in FLOORS if room in names) >= {room, other}:
            assert FLOOR[other] < FLOOR[room], f'{path.name} imports {other}, which is above {room}'


def test_the_documentation_lists_the_floors():
    rows = re.findall(r'^\| \d+ \| ([^|]+) \|', (ROOT / 'docs' / 'architecture.md').read_text(), re.MULTILINE)
    assert [set(re.findall(r'`([a-z_]+)/?`', row)) for row in rows] == [
        names - {'checkpoint', 'programs'} for names in FLOORS]


def test_no_file_imports_itself_in_a_circle():
    modules = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for _, path in sources()}
    arrows = {name: {m for m in imported(path) if m in modules and m != name} for name, path in modules.items()}
    done = set()

    def visit(name, trail):
        assert name not in trail, ' -> '.join((*trail, name))
        if name not in done:
            for other in arrows[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in modules:
        visit(name, ())


@each_file
def test_files_and_functions_are_short(room, path):
    text = path.read_text()
    assert len(text.splitlines()) <= (600 if room == 'config' else 450)
    for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
        lines, arguments = function.end_lineno - function.lineno + 1, function.args
        assert lines <= 60, f'{path.name}: {function.name} has {lines} lines'
        if function.name != '__init__':  # layers, transforms and losses have as many settings as they have
            assert len(arguments.posonlyargs + arguments.args) <= 8, f'{path.name}: parameters of {function.name}'


@pytest.mark.parametrize(('module', 'name'), [
    ('checkpoint', 'load_weights'), ('programs', 'load_paddle_program'), ('predict', 'Predictor'), ('fuse', 'pack'),
    ('zoo', 'pretrained_weights'), ('replknet', 'replknet_31b'), ('dense', 'RepLKNetSeg'), ('config', 'get_config'),
    ('datasets', 'get_transform'), ('large_kernel', 'load_operator')])
def test_imports_of_earlier_documentation_work(module, name):
    assert hasattr(importlib.import_module(module), name)
