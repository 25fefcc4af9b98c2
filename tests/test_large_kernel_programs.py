"""The depthwise convolution in traced and exported programs, and in several processes."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from large_kernel import DepthwiseConv2D, build

import paddle  # isort: skip
from paddle import nn  # isort: skip

ROOT = Path(__file__).parent.parent

needs_operator = pytest.mark.skipif(build.reason_unavailable() is not None,
                                    reason=f'no C++ operator: {build.reason_unavailable()}')


class Net(nn.Layer):
    """Convolutions that oneDNN takes around ours, as in the network."""

    def __init__(self):
        super().__init__()
        self.reduce, self.large = nn.Conv2D(3, 20, 1), DepthwiseConv2D(20, 13)
        self.expand, self.small = nn.Conv2D(20, 24, 1), DepthwiseConv2D(24, 3, 2, bias_attr=False)

    def forward(self, x):
        return self.small(nn.functional.gelu(self.expand(nn.functional.relu(self.large(self.reduce(x))))))


PREDICT = """
import sys
import numpy as np
import large_kernel
large_kernel.load_operator()
from paddle import inference
folder, onednn = sys.argv[1:]
program = [p for p in ('m.json', 'm.pdmodel') if (__import__('os').path.exists(f'{folder}/{p}'))][0]
config = inference.Config(f'{folder}/{program}', f'{folder}/m.pdiparams')
config.enable_mkldnn() if onednn == '1' else config.disable_mkldnn()
predictor = inference.create_predictor(config)
source = predictor.get_input_handle(predictor.get_input_names()[0])
for i in range(2):  # two image sizes through one program
    source.copy_from_cpu(np.load(f'{folder}/x{i}.npy'))
    predictor.run()
    y = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    np.testing.assert_allclose(y, np.load(f'{folder}/y{i}.npy'), rtol=1e-3, atol=1e-5)
print('same')
"""


@needs_operator
def test_exported_program_runs_the_operator_in_paddle_inference(force, tmp_path):
    force('auto')
    net = Net()
    net.eval()
    for i, shape in enumerate([[2, 3, 19, 22], [1, 3, 30, 14]]):
        x = paddle.randn(shape)
        np.save(tmp_path / f'x{i}.npy', x.numpy())
        np.save(tmp_path / f'y{i}.npy', net(x).numpy())
    spec = paddle.static.InputSpec([None, 3, None, None], 'float32', 'x')
    paddle.jit.save(net, str(tmp_path / 'm'), input_spec=[spec])
    program = (tmp_path / 'm.json' if (tmp_path / 'm.json').exists() else tmp_path / 'm.pdmodel').read_bytes()
    assert b'large_kernel_conv' in program
    loaded = paddle.jit.load(str(tmp_path / 'm'))
    np.testing.assert_allclose(loaded(x).numpy(), net(x).numpy(), rtol=1e-4, atol=1e-6)
    for onednn in '01':
        result = subprocess.run([sys.executable, '-c', PREDICT, str(tmp_path), onednn], cwd=ROOT, text=True,
                                capture_output=True)
        assert result.stdout.strip().endswith('same'), result.stderr[-2000:]


@needs_operator
def test_traced_program_trains_like_the_layer(force):
    force('auto')
    net = Net()
    x = paddle.randn([2, 3, 16, 16])

    def gradients(run):
        net.clear_gradients()
        run(x).pow(2).sum().backward()
        return [p.grad.numpy().copy() for p in net.parameters()]

    for a, b in zip(gradients(net), gradients(paddle.jit.to_static(net.forward, full_graph=True))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


DATA_PARALLEL = """
import os, sys
import numpy as np
import large_kernel, paddle
import paddle.distributed as dist
from paddle import nn

def make():
    paddle.seed(0)
    return nn.Sequential(large_kernel.DepthwiseConv2D(5, 13), nn.ReLU(), large_kernel.DepthwiseConv2D(5, 3, 2))

def worker(folder):
    dist.init_parallel_env()
    net = paddle.DataParallel(make())
    x = paddle.to_tensor(np.load(folder + '/x.npy'))[dist.get_rank()::2]
    net(x).mean().backward()
    if dist.get_rank() == 0:
        np.savez(folder + '/grads.npz', *[p.grad.numpy() for p in net.parameters()])
    os._exit(0)  # see launcher.end_process

if __name__ == '__main__':
    folder = sys.argv[1]
    np.save(folder + '/x.npy', np.random.default_rng(0).standard_normal((4, 5, 12, 12)).astype('float32'))
    dist.spawn(worker, (folder,), nprocs=2, backend='gloo')
    net = make()
    net(paddle.to_tensor(np.load(folder + '/x.npy'))).mean().backward()
    found = np.load(folder + '/grads.npz')
    for p, name in zip(net.parameters(), found.files):
        np.testing.assert_allclose(found[name], p.grad.numpy(), rtol=1e-4, atol=1e-6)
    print('same')
"""


@needs_operator
def test_data_parallel_processes_average_the_gradients(tmp_path):
    script = tmp_path / 'parallel.py'
    script.write_text(DATA_PARALLEL)
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], text=True, capture_output=True,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=120)
    assert result.stdout.strip().endswith('same'), result.stderr[-2000:]
