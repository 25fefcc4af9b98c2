"""Options and fixtures shared by all tests."""
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / 'golden'


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='also run the tests that take minutes')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--long'):
        for item in items:
            if 'long' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='takes minutes: run with --long'))


@pytest.fixture
def golden():
    """Folder of the reference data made with the official code."""
    return GOLDEN
