"""What a case will need: decides whether it fits, and stands in for the cases that a run leaves out."""

from __future__ import annotations

from benchmarks.implementations import DTYPES, Case
from benchmarks.shapes import CHANNELS, QUERY_CHANNELS
from danet_kernels import memory_estimate

# Above this N what holds the N x N map is predicted unless --full asks for it: 8.5 GiB and tens of seconds.
LARGEST_MEASURED_MAP = 16384


def holds_map(case: Case) -> bool:
    """Whether the case keeps the N x N map of position attention, in any form, and so grows with N * N."""
    return case.op == "position_attention" and case.name in ("eager", "sdpa", "danet:eager")


def predict_extra_memory(case: Case) -> int:
    """Peak extra bytes of the block. For the peers fitted to measurements with torch 2.13 on a CPU; a test compares."""
    size = DTYPES[case.dtype].itemsize
    value = case.batch * CHANNELS * case.crop.positions  # elements of one [B, C, N] tensor
    if case.name.startswith("danet:"):
        return _ours(case, value * size)
    if case.op == "channel_attention":
        return (9 if case.train else 4) * value * size
    entries = case.batch * case.crop.positions**2  # of one map
    if case.name == "eager":
        # Forward: logits, probabilities. Backward: probabilities, their gradient and its transposed copy, dlogits.
        return (4 * entries + 11 * value) * size if case.train else (2 * entries + 8 * value) * size
    if case.name == "sdpa":
        # The math path: maps in fp32 whatever the dtype, and forward a mask of one byte per entry.
        return 12 * entries + 36 * value if case.train else 9 * entries + 11 * value
    return (16 if case.train else 8) * value * size  # sdpa-padded: no map


def _ours(case: Case, value_bytes: int) -> int:
    shape = (case.batch, CHANNELS, *case.crop.spatial)
    options = {"query_channels": QUERY_CHANNELS} if case.op == "position_attention" else {}
    backend = case.name.removeprefix("danet:")
    estimate = memory_estimate(case.op, shape, DTYPES[case.dtype], training=case.train, backend=backend, **options)
    if case.op == "channel_attention":
        return estimate.total
    # The convolutions: query, key and value; when training also the gradient of the features, a sum of three.
    projected = value_bytes * (CHANNELS + 2 * QUERY_CHANNELS) // CHANNELS
    return estimate.total + projected + (3 * value_bytes if case.train else 0)
