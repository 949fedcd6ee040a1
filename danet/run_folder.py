"""What a training run leaves on the disk: checkpoints to go on from, a log, the best model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ._files import whole
from .model import DANet


class RunFolder:
    """A folder for one run.

    log.jsonl: one JSON object a line. checkpoints/step_<number>.pt: all that is needed to go on. Every checkpoint is
    whole or not there.

    Args:
        path: the folder, made if need be.
        keep: how many checkpoints to keep, the newest.
        tensorboard: whether numbers are written for TensorBoard too.
        writes: whether this process writes; of several only one does.
    """

    def __init__(self, path: str | Path, keep: int, *, tensorboard: bool = False, writes: bool = True) -> None:
        self.path, self.keep, self.writes = Path(path), keep, writes
        self._log = self.path / "log.jsonl"
        self._board = None
        if tensorboard and writes:
            self._board = _summary_writer(self.path / "tensorboard")

    def checkpoints(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(self.path.glob("checkpoints/step_*.pt"))

    def holds_a_run(self) -> bool:
        return self._log.exists() or bool(self.checkpoints())

    def newest(self) -> dict[str, Any] | None:
        """The state that was saved last; None: there is none.

        Raises:
            ValueError: it cannot be read. Nothing that the file holds is run.
        """
        if not self.checkpoints():
            return None
        newest = self.checkpoints()[-1]
        try:
            state: dict[str, Any] = torch.load(newest, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch have one of their own for every kind of damage
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{newest} cannot be read ({reason}); delete it to go on from the one before") from None
        return state

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then remove those that are not kept."""
        if not self.writes:
            return
        with whole(self.path / "checkpoints" / f"step_{step:08d}.pt") as partial, partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        for old in self.checkpoints()[: -self.keep]:
            old.unlink()

    def save_model(self, name: str, model: DANet) -> None:
        """The folder `name` by save_pretrained; or, of a model that create_model has not made, its state as name.pt."""
        if not self.writes:
            return
        if model.config is not None:
            model.save_pretrained(self.path / name)
            return
        with whole(self.path / f"{name}.pt") as partial:
            torch.save(model.state_dict(), partial)

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append a line. `step`: how many are done."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def forget_after(self, step: int) -> None:
        """Drop lines of the log beyond a step: the run that goes on from it writes them again."""
        if not self.writes or not self._log.exists():
            return
        lines = self._log.read_text(encoding="utf-8").split("\n")[:-1]  # a last one without its end was not written out
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with whole(self._log) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _summary_writer(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard is not installed: pip install tensorboard") from None
    return SummaryWriter(str(path))
