"""RepLKNet-31B at full size, with every part of the recipe."""
import json
import resource

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from port_weights.safe_load import read_checkpoint


@pytest.mark.long
def test_a_training_step_of_31b_with_every_feature_on(run_script, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (256, 320, 3), dtype=np.uint8)).save(tmp_path / f'{index}.jpg')
    (tmp_path / 'train_list.txt').write_text(''.join(f'{index}.jpg {index * 300}\n' for index in range(4)))
    run = tmp_path / 'run'
    done = run_script(
        'main_single_gpu.py', '-cfg=configs/replknet_31b.yaml', f'-data_path={tmp_path}', f'-output={run}',
        '-device=cpu', '-batch_size=2', '-accum_iter=2', '-num_workers=2', '-opts',
        'MODEL.RECOMPUTE', 'True', 'MODEL.DROPPATH', '0.2', 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.WARMUP_EPOCHS', '0',
        'TRAIN.LAYER_DECAY', '0.7', 'TRAIN.GRAD_CLIP', '5', 'TRAIN.WEIGHT_DECAY_END', '0.1', 'TRAIN.MODEL_EMA', 'True',
        'TRAIN.MODEL_EMA_DECAY', '0.9', 'TRAIN.RANDOM_ERASE_PROB', '1', 'VALIDATE_FREQ', '0', OMP_NUM_THREADS='2',
        cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr
    record, = (json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines())
    print(f"{record['seconds']:.1f} s, peak {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20:.1f} GiB")
    assert (record['steps'], record['images'], record['lr']) == (1, 4, 4e-3)
    assert record['loss'] == pytest.approx(np.log(1000), abs=1)  # of an untrained model
    state = read_checkpoint(run / 'last.pdparams')
    trained = state['optimizer']['accumulators']
    assert sum(state['model'][name].size for name in trained) == 79_864_168
    for name, moments in trained.items():  # at these drop path rates every block gets a gradient
        assert np.isfinite(state['model'][name]).all() and moments['moment1'].any(), name
        assert (state['model'][name] != state['model_ema'][name]).any(), name
    (run / 'last.pdparams').unlink()  # 1.3 GB
