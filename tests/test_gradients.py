"""Recomputation, accumulation, loss scaling and several processes change no gradient and no statistic."""
import json
import re

from conftest import ROOT


def test_every_combination_gives_the_gradients_of_the_plain_run(run_script):
    done = run_script('tests/gradient_table.py', PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in re.findall('{"processes".*?}', done.stdout)]
    assert len(rows) == 8 + 8 * 2  # two processes report each
    assert all(row['gradient'] < 1e-6 and row['statistic'] < 1e-6 for row in rows), rows
