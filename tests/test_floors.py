"""The layout rule: a file imports only files of a lower floor, apart from the neighbours named here."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {'errors', 'files', 'paddle_env', 'recipes', 'config', 'utils', 'stopping'},
    {'auto_augment', 'transforms', 'mixup', 'losses', 'loss_scaler', 'large_kernel', 'replknet', 'optim', 'optimizers',
     'schedules', 'ema', 'safe_load', 'checkpoint', 'monitor'},
    {'datasets', 'port_weights', 'zoo', 'run_folder', 'cost', 'prepare_digits', 'fuse', 'onnx_graph', 'programs',
     'certificate', 'contact_sheets'},
    {'engine', 'doctor', 'checkup', 'dense', 'hubconf'},
    {'run_state'},
    {'run'},
    {'launcher'},
    {'main_single_gpu', 'main_multi_gpu', 'export', 'predictor'},
    {'predict', 'benchmark'},
]
NEIGHBOURS = {('config', 'errors'), ('config', 'large_kernel'), ('utils', 'errors'), ('replknet', 'large_kernel'),
              ('checkpoint', 'safe_load'), ('zoo', 'port_weights'), ('optim', 'optimizers'), ('doctor', 'checkup'),
              ('transforms', 'auto_augment'), ('loss_scaler', 'optim'), ('contact_sheets', 'datasets'),
              ('stopping', 'errors')}
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def sources():
    for path in sorted(ROOT.glob('*.py')):
        yield path.stem, path
    for package in ('large_kernel', 'port_weights'):
        for path in sorted((ROOT / package).glob('*.py')):
            yield package, path


@pytest.mark.parametrize(('name', 'path'), list(sources()), ids=lambda v: v.name if isinstance(v, Path) else '')
def test_a_file_imports_only_lower_floors(name, path):
    assert name in FLOOR, f'{path.name} has no floor: add it to FLOORS'
    for node in ast.walk(ast.parse(path.read_text())):
        imported = ([node.module or ''] if isinstance(node, ast.ImportFrom) else
                    [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        for module in (m.split('.')[0] for m in imported):
            if module in FLOOR and module != name and (name, module) not in NEIGHBOURS:
                assert FLOOR[module] < FLOOR[name], f'{path.name} imports {module} of floor {FLOOR[module]}'
