"""State dicts: read without running anything that a file holds, and loaded with every mismatch in one message."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Weights = Mapping[str, Any] | str | Path
"""A state dict, the dictionary of a training run around one, or the path of a file that holds either."""

_COUNTER = "num_batches_tracked"  # of BatchNorm; older files lack it, and it is not used with a momentum


def read(weights: Weights) -> dict[str, Tensor]:
    """The state dict itself, out of the dictionary of a training run if need be, without the prefix of DataParallel.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, holds more than tensors and plain values, or no state dict.
    """
    found: Any = weights if isinstance(weights, Mapping) else _read_file(Path(weights))
    source = describe(weights)
    while isinstance(found, Mapping):
        inner = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{source} holds no state dict")
    wrong = [str(key) for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if wrong:
        raise ValueError(
            f"{source} is no state dict: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} no tensor"
        )
    prefix = "module." if all(key.startswith("module.") for key in found) else ""
    return {key.removeprefix(prefix): value for key, value in found.items()}


def assign(module: nn.Module, state: Mapping[str, Tensor], source: str, hint: str = "") -> None:
    """Load `state` into `module`, or change nothing and raise the error of `check`."""
    check(module, state, source, hint)
    module.load_state_dict(dict(state), strict=False)


def check(module: nn.Module, state: Mapping[str, Tensor], source: str, hint: str = "") -> None:
    """Raise a ValueError that lists every mismatch, unless `state` has the names and shapes of `module`."""
    own = module.state_dict()
    complaints = [
        *(f"missing: {name}" for name in own if name not in state and not name.endswith(_COUNTER)),
        *(f"not in the model: {name}" for name in state if name not in own),
        *(
            f"shape of {name}: {list(tensor.shape)}, the model has {list(own[name].shape)}"
            for name, tensor in state.items()
            if name in own and tensor.shape != own[name].shape
        ),
    ]
    if complaints:
        raise ValueError(listed(f"{source} does not fit the model. {hint}".rstrip(), complaints))


def listed(sentence: str, lines: Iterable[str]) -> str:
    """The sentence, and below it every line."""
    return "\n  ".join([sentence, *lines])


def describe(weights: Weights) -> str:
    """How messages call it."""
    return "the state dict" if isinstance(weights, Mapping) else str(weights)


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    scalar = np.float64(0).__reduce__()[0]
    # Scores of a run are often scalars of numpy: as plain as a float, under the module's old name or its new one.
    plain: list[Any] = [np.dtype, np.dtypes.Float64DType, scalar, (scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "WeightsUnpickler" in line), str(error))
        raise ValueError(
            f"{path} is not loaded: it is damaged, or holds Python objects besides tensors and plain values, and "
            f"loading those could run code ({reason.strip().split('. Please')[0]})"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is no readable file of torch.save: {error}") from None
