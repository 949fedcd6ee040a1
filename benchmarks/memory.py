"""Peak extra memory of one call, measured in a process of its own.

On the CPU the figure is what Linux saw: the largest resident set during the call (VmHWM, reset just before) minus the
resident set with the inputs in place. Outputs, gradients and scratch count; inputs do not. The process is new for every
measurement, because memory that an earlier call freed but malloc kept would hide part of the next call's peak; and it
is forked from a server that has imported torch but never opened a parallel region, because a forked OpenMP pool hangs.
On a GPU the caching allocator keeps the peak itself, so the call is measured in the current process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 1024**2
GIB = 1024**3
_PRELOAD = ["torch", "danet_kernels", "benchmarks.implementations"]  # imported once, in the fork server


class CaseFailed(RuntimeError):
    """A case raised, or its process died; the message is one line that says how."""


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    on_progress: Callable[[Any], None] = lambda message: None,
    silence: float | None = None,
) -> Any:
    """`function(*arguments)` in a fresh forked process; function, arguments and result must pickle.

    What the function passes to `report_progress` meanwhile arrives at `on_progress`. A process that reports nothing for
    `silence` seconds is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(silence):
                process.kill()
                process.join()
                raise CaseFailed(f"its process reported nothing for {silence:g} s and was killed")
            message = receiver.recv()
            if message[0] != "progress":
                break
            on_progress(message[1])
    except EOFError:
        process.join()
        code = process.exitcode or 0
        raise CaseFailed(
            f"its process was killed by signal {-code}" if code < 0 else f"its process ended with status {code}"
        ) from None
    finally:
        receiver.close()
    process.join()
    outcome, result = message
    if outcome == "failed":
        raise CaseFailed(result)
    return result


_sender: Any = None  # the way to the parent, in a process that run_isolated started


def report_progress(message: Any) -> None:
    """From inside `run_isolated`: hand `message` to its `on_progress`. Elsewhere: nothing."""
    if _sender is not None:
        _sender.send(("progress", message))


def _child(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _sender
    _sender = sender
    try:
        sender.send(("done", function(*arguments)))
    except Exception as error:  # the parent decides what a failed case means
        sender.send(("failed", describe(error)))
    sender.close()


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def peak_extra_memory(
    make_inputs: Callable[[], Any],
    call: Callable[[Any], Any],
    warm_up: Callable[[], Any] | None = None,
    *,
    device: str = "cpu",
) -> int:
    """Largest number of extra bytes in use during `call(make_inputs())`.

    `warm_up()` runs first and should do the same on a small size: it starts the threads and lets libraries make their
    one-off buffers. All three callables must pickle (module-level functions, `functools.partial` of them): on the CPU
    they run in a process of their own.
    """
    if torch.device(device).type == "cuda":
        return _peak_cuda(make_inputs, call, warm_up, torch.device(device))
    return run_isolated(_peak_cpu, make_inputs, call, warm_up)


def _peak_cpu(make_inputs: Callable[[], Any], call: Callable[[Any], Any], warm_up: Callable[[], Any] | None) -> int:
    if warm_up is not None:
        warm_up()
    inputs = make_inputs()
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    before = _status_bytes("VmRSS")
    result = call(inputs)
    peak = _status_bytes("VmHWM")
    del result, inputs  # alive until here: outputs and inputs belong to the moment that was measured
    return max(peak - before, 0)


def _peak_cuda(
    make_inputs: Callable[[], Any], call: Callable[[Any], Any], warm_up: Callable[[], Any] | None, device: torch.device
) -> int:
    if warm_up is not None:
        warm_up()
    inputs = make_inputs()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call(inputs)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result, inputs
    return peak - before


def _return_free_memory() -> None:
    """Give malloc's free pages back, else the call reuses what making the inputs left behind and looks too cheap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def peak_of_process() -> int:
    """The most memory that this process has ever held, in bytes (VmHWM of Linux)."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {field}")


def free_memory(device: str = "cpu") -> int:
    """Bytes a new case may use: free device memory, or what Linux has without swapping and the cgroup allows."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
