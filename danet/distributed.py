"""Several processes, one for each device, started by torchrun; and the same code where there is only one."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def process_group(device: str = "cpu") -> Iterator[torch.device]:
    """The device of this process; under torchrun, within torch.distributed (NCCL on GPUs, else Gloo).

    Args:
        device: "cpu", "cuda" (under torchrun: the GPU of the local rank) or one such as "cuda:1".

    Raises:
        ValueError: there is no such device, or fewer of them than processes.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{device!r} is no device, expected cpu, cuda or one such as cuda:1") from None
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if wanted.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if several else (wanted.index or 0)
        if index >= torch.cuda.device_count():
            raise ValueError(f"device cuda:{index} is wanted, and this torch sees {torch.cuda.device_count()} GPUs")
        wanted = torch.device("cuda", index)
        torch.cuda.set_device(wanted)
    if not several:
        yield wanted
        return
    dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo")
    try:
        yield wanted
    finally:
        gc.collect()  # DistributedDataParallel lies in cycles of references and would keep the group until Python's end
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are: (0, 1) where torch.distributed is not in use."""
    return (dist.get_rank(), dist.get_world_size()) if _in_use() else (0, 1)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, on the device of `values`."""
    if not _in_use():
        return values
    total = values.cuda() if dist.get_backend() == "nccl" else values.clone()  # NCCL sums on GPUs alone
    dist.all_reduce(total)
    return total.to(values.device)


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if _in_use():
        dist.barrier()


def _in_use() -> bool:
    return dist.is_available() and dist.is_initialized()
