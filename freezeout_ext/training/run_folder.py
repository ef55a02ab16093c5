"""RunFolder: what a run leaves on disk, whole at any moment, and used by one process at a time."""

import contextlib
import fcntl
import json
import os
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from .config import TrainConfig

# What Trainer.state_dict holds.
STATE = {"config", "epoch", "step", "model", "optimizer", "freezeout", "scaler", "train_seconds", "phases"}


class RunFolder:
    """A folder with config.json, log.jsonl (one line an epoch), checkpoint.pt, best.pt, result.json.

    The checkpoint decides how far the run is. The log is written before the checkpoint, and cut back to it on resume.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.log_path = self.path / "log.jsonl"
        self.checkpoint_path = self.path / "checkpoint.pt"
        self.best_path = self.path / "best.pt"
        self.result_path = self.path / "result.json"
        self._unlock: Callable[[], object] | None = None

    def holds_run(self) -> bool:
        return self.config_path.is_file()

    def lock(self) -> None:
        """Keeps other processes out of the folder until `unlock`, or until this process ends in whatever way.

        Raises:
            ValueError: another process, or another RunFolder of this one, has the folder.
        """
        if self._unlock is None:
            folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(folder)
                raise ValueError(f"out must not be in use, another process is training in {self.path}") from None
            except OSError:
                os.close(folder)
                raise
            _locked.add(folder)
            self._unlock = weakref.finalize(self, _release, folder)

    def unlock(self) -> None:
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def check_free(self) -> None:
        """Raises ValueError where a new run must not be put here; writes nothing."""
        if self.holds_run():
            raise ValueError(f"out must not hold a run yet, {self.path} does: continue it with --resume")
        check_empty(self.path)

    def create(self, config: TrainConfig) -> None:
        make_folder(self.path)
        self.lock()
        self.check_free()
        write_json(self.config_path, config.to_dict())

    def load_config(self) -> TrainConfig:
        if not self.holds_run():
            raise ValueError(f"resume must name the folder of a run, {self.path} has no {self.config_path.name}")
        try:
            return TrainConfig.from_dict(read_json(self.config_path))
        except ValueError as error:
            raise ValueError(f"{self.config_path}: {error}") from None

    def save_checkpoint(self, state: dict) -> None:
        _save(self.checkpoint_path, state)

    def save_best(self, state: dict) -> None:
        _save(self.best_path, state)

    def load_checkpoint(self, config: TrainConfig) -> dict | None:
        """The last checkpoint, on the CPU; None where the run was stopped before its first.

        Raises:
            ValueError: it is damaged, or of another run than `config`.
        """
        if not self.checkpoint_path.exists():
            return None
        try:
            with zipfile.ZipFile(self.checkpoint_path) as archive:  # torch checks no CRC
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} is damaged")
            state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it must hold a dict, got {type(state).__name__}")
            if missing := STATE - set(state):
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            there = TrainConfig.from_dict(state["config"])
        except Exception as error:  # a broken archive raises whatever the operation it breaks at raises
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

    def check_log(self, epochs: int) -> None:
        """Raises ValueError where the log lacks a row of the first `epochs` epochs."""
        if (found := len(self.read_log())) < epochs:
            raise ValueError(
                f"{self.log_path} must have a row for each of the checkpoint's {epochs} epochs, it has {found}:"
                " start anew in another folder"
            )

    def cut_log(self, epochs: int) -> None:
        """Keeps the rows of the first `epochs` epochs. A line that a kill tore goes too."""
        rows = self.read_log()[:epochs]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.log_path, lambda file: file.write(text.encode()))

    def read_log(self) -> list[dict]:
        """The rows of epochs 1, 2, ..., up to the first line that is no such row."""
        rows: list[dict] = []
        if not self.log_path.exists():
            return rows
        for line in self.log_path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or row.get("epoch") != len(rows) + 1 or not _is_row(row):
                break
            rows.append(row)
        return rows

    def save_result(self, result: dict) -> None:
        write_json(self.result_path, result)

    def load_result(self) -> dict | None:
        """result.json; None where there is none.

        Raises:
            ValueError: it is damaged.
        """
        if not self.result_path.exists():
            return None
        result = read_json(self.result_path)
        if missing := {"config", "train_seconds", "phases", "transitions", "layers"} - set(result):
            names = ", ".join(sorted(missing))
            raise ValueError(f"{self.result_path} lacks {names}: delete it, --resume writes it anew")
        return result


def _is_row(row: dict) -> bool:
    """Whether a row of the log has what is drawn, shown and compared."""
    numbers = ("step", "train_loss", "test_loss", "num_frozen", "seconds_per_step", "train_seconds")
    lists = isinstance(row.get("transitions"), list) and isinstance(row.get("learning_rates"), list)
    return lists and all(isinstance(row.get(name), int | float) for name in numbers)


# Descriptors of folders that this process has locked. A child of fork would hold the locks on after this process is
# killed, such as a worker of a loader, so it closes them.
_locked: set[int] = set()


def _release(folder: int) -> None:
    _locked.discard(folder)
    with contextlib.suppress(OSError):
        os.close(folder)


def _forget_locks() -> None:
    for folder in list(_locked):
        _release(folder)


os.register_at_fork(after_in_child=_forget_locks)


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


def check_file(name: str, path: Path | None) -> None:
    """Raises ValueError where `path`, the argument called `name`, can be no file: a folder, "", a device, a pipe."""
    if path is None:
        return
    if path.is_dir() or not path.name:
        raise ValueError(f"{name} must name a file, got the folder {path}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} must name a file, got {path}, which is a device or a pipe")


def _save(path: Path, state: dict) -> None:
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # torch's writer wraps what the file raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`path` has its old content or, once this returned, all of its new one, also after a power cut.

    Where `path` is a link, the file that the link names is written.

    Raises:
        OSError: the file cannot be written, of which nothing stays.
        ValueError: `path` can be no file.
    """
    check_file("path", path)
    path = Path(os.path.realpath(path))  # Path.resolve raises no OSError for a circle of links
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict:
    """Raises ValueError where the file is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
