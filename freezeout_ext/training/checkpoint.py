"""RunFolder: what a run leaves on disk, whole at any moment."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from .config import TrainConfig


class RunFolder:
    """A folder with config.json, log.jsonl (one line an epoch), checkpoint.pt, best.pt, result.json.

    The checkpoint decides how far the run is: the log is written before it, and cut back to it on resume.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.log_path = self.path / "log.jsonl"
        self.checkpoint_path = self.path / "checkpoint.pt"
        self.best_path = self.path / "best.pt"
        self.result_path = self.path / "result.json"

    def holds_run(self) -> bool:
        return self.config_path.is_file()

    def check_free(self) -> None:
        """Raises ValueError where a new run must not be put here; writes nothing."""
        if self.holds_run():
            raise ValueError(f"out must not hold a run yet, {self.path} does: continue it with --resume")
        check_empty(self.path)

    def create(self, config: TrainConfig) -> None:
        make_folder(self.path)
        write_json(self.config_path, config.to_dict())

    def load_config(self) -> TrainConfig:
        if not self.holds_run():
            raise ValueError(f"resume must name the folder of a run, {self.path} has no {self.config_path.name}")
        try:
            return TrainConfig.from_dict(read_json(self.config_path))
        except ValueError as error:
            raise ValueError(f"{self.config_path}: {error}") from None

    def save_checkpoint(self, state: dict) -> None:
        write_atomically(self.checkpoint_path, lambda file: torch.save(state, file))

    def save_best(self, state: dict) -> None:
        write_atomically(self.best_path, lambda file: torch.save(state, file))

    def load_checkpoint(self, config: TrainConfig) -> dict | None:
        """The last checkpoint, on the CPU; None where the run was stopped before its first.

        Raises:
            ValueError: it cannot be read, or is of another run than `config`.
        """
        if not self.checkpoint_path.exists():
            return None
        try:
            state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            there = TrainConfig.from_dict(state["config"])
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.checkpoint_path} is not a checkpoint that can be read: {reason}") from None
        if difference := there.difference(config):
            raise ValueError(f"{self.checkpoint_path} is of another run: {difference}")
        return state

    def append_log(self, row: dict) -> None:
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_log(self, epochs: int) -> None:
        """Keeps the rows of the first `epochs` epochs; a line that a kill tore goes too."""
        rows = [row for row in self.read_log() if row["epoch"] <= epochs]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.log_path, lambda file: file.write(text.encode()))

    def read_log(self) -> list[dict]:
        rows = []
        if self.log_path.exists():
            for line in self.log_path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
        return rows

    def save_result(self, result: dict) -> None:
        write_json(self.result_path, result)

    def load_result(self) -> dict | None:
        return read_json(self.result_path) if self.result_path.exists() else None


def check_empty(path: Path) -> None:
    """Raises ValueError where `path` is a folder with something in it, or no folder."""
    if path.is_dir():
        # What a kill at the very start leaves does not count.
        if any(entry.suffix != ".tmp" for entry in path.iterdir()):
            raise ValueError(f"out must be a new or an empty folder, {path} is not empty")
    elif path.exists():
        raise ValueError(f"out must be a folder, {path} is a file")


def make_folder(path: Path) -> None:
    """Raises ValueError where the folder cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / "probe.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written to, {path} is not: {error.strerror}") from None


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`path` has its old content or, once this returned, all of its new one, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object, *, indent: int | None = 2) -> None:
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict:
    """Raises ValueError where the file is no JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
