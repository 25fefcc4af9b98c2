"""Recomputation, accumulation, loss scaling and several processes change neither gradients nor statistics."""
import json
import re

import paddle
from conftest import ROOT

from replknet import RepLKNet, _as_in_first_pass


def test_every_combination_gives_the_gradients_of_the_plain_run(run_script):
    done = run_script('tests/gradient_table.py', PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in re.findall('{"processes".*?}', done.stdout)]
    assert len(rows) == 8 + 8 * 2  # two processes report each
    assert all(row['gradient'] < 1e-6 and row['statistic'] < 1e-6 for row in rows), rows


def test_a_second_pass_leaves_the_statistics_of_sync_batch_norm_alone():
    """Its kernel is for GPUs only; what recomputation sets for the second pass can be tested anywhere."""
    model = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(RepLKNet([9], [1], [4]))
    norms = [layer for layer in model.sublayers() if isinstance(layer, paddle.nn.SyncBatchNorm)]
    before = [norm._momentum for norm in norms]
    with _as_in_first_pass(model, paddle.get_rng_state()):
        assert norms and all(norm._momentum == 1 for norm in norms)
    assert [norm._momentum for norm in norms] == before
