"""Calls from several threads and processes at once: equal results, and no child that hangs on its parent's threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from on_backend import device_of, for_each_backend, for_each_cpu_backend, is_slow

import danet_kernels
from danet_kernels import channel_attention, position_attention

pytestmark = pytest.mark.usefixtures("deterministic")


def size_of_map(backend: str) -> int:
    """Height and width; interpreted kernels run one after the other anyway."""
    return 6 if is_slow(backend) else 24


def step(backend: str, seed: int) -> list[torch.Tensor]:
    """Forward and backward of both operators: the result and all gradients."""
    size = size_of_map(backend)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 8, size, size), (1, 40, size, size))
    query, value = (torch.randn(shape, generator=generator).to(device_of(backend)).requires_grad_() for shape in shapes)
    gamma = torch.tensor([0.5], device=value.device, requires_grad=True)
    out = position_attention(query, query, value, value, gamma, backend=backend)
    out = channel_attention(out, gamma, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), (query, value, gamma))]


@for_each_backend
def test_four_threads_get_the_bits_of_one(backend):
    expected = [step(backend, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, wanted in zip(pool.map(lambda seed: step(backend, seed), range(8)), expected, strict=True):
                assert all(map(torch.equal, got, wanted))


@for_each_backend
def test_an_error_in_one_thread_leaves_the_others_alone(backend):
    expected = step(backend, 0)

    def work(index: int) -> bool:
        if index % 2:
            with pytest.raises(ValueError, match="at least 3 dimensions"):
                channel_attention(torch.ones(2, 3), backend=backend)
            return True
        return all(map(torch.equal, step(backend, 0), expected))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))


@for_each_backend
def test_modes_belong_to_their_thread(backend):
    """Autograd and inference mode are thread-local; a worker that another thread's call has used must not keep them."""
    size = size_of_map(backend)
    value = torch.randn(1, 40, size, size, device=device_of(backend), requires_grad=True)

    def work(index: int) -> bool:
        with torch.inference_mode(index % 2 == 1):
            out = channel_attention(value, 0.5, backend=backend)
            return out.requires_grad == (index % 2 == 0) and out.is_inference() == (index % 2 == 1)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(32)))


DATA_LOADER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from danet_kernels import channel_attention, position_attention

class Attended(Dataset):
    def __init__(self, backend):
        self.backend = backend
    def __len__(self):
        return 4
    def __getitem__(self, index):
        x = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(index))
        out = position_attention(x, x, x, x, 0.5, backend=self.backend)
        return channel_attention(out, 0.5, backend=self.backend)

if __name__ == "__main__":
    backend, method, first = sys.argv[1:]
    data = Attended(backend)
    if first == "parent_first":  # its threads do not come along into a forked child
        expected = [data[index] for index in range(4)]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60)
    loaded = list(loader)
    if first != "parent_first":
        expected = [data[index] for index in range(4)]
    assert all(map(torch.equal, loaded, expected))
    print("equal")
"""

PLAIN_FORK = """
import os, sys
import torch
from danet_kernels import channel_attention, position_attention

def step():
    x = torch.ones(1, 16, 24, 24).cumsum(-1).div(24).requires_grad_()
    out = channel_attention(position_attention(x, x, x, x, 0.5, backend=sys.argv[1]), 0.5, backend=sys.argv[1])
    return torch.autograd.grad(out.sum(), x)[0]

expected = step()  # opens a parallel region
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as DataLoader does in its workers: torch's threads do not survive a fork
    os._exit(0 if torch.allclose(step(), expected) else 1)
print("equal" if os.waitpid(child, 0)[1] == 0 else "different")
"""


def run(tmp_path: Path, script: str, *arguments: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("DANET")}
    environment["PYTHONPATH"] = str(Path(danet_kernels.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, str(path), *arguments], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@for_each_cpu_backend
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
@pytest.mark.parametrize("first", ["parent_first", "workers_first"])
def test_forked_data_loader_workers(first, tmp_path, backend):
    """The usual training script: workers forked before or after the parent has computed something."""
    assert run(tmp_path, DATA_LOADER, backend, "fork", first) == "equal"


@for_each_cpu_backend
def test_spawned_data_loader_workers(tmp_path, backend):
    assert run(tmp_path, DATA_LOADER, backend, "spawn", "parent_first") == "equal"


@for_each_cpu_backend
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
def test_a_forked_child_with_one_thread(tmp_path, backend):
    assert run(tmp_path, PLAIN_FORK, backend) == "equal"
