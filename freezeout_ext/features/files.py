"""Files: tensors mapped from files, a journal of the rows that are on disk, and of which views a folder's rows are."""

import fcntl
import json
import math
import mmap
import os
import shutil
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# key, row, first position, number of positions, the checksum of the row's data, and that of all these.
RECORD = struct.Struct("<4qII")
# The row lies below this bit, what the store notes of the row above it.
ORIGIN_BIT = 48
# How often written rows are brought to disk. A kill in between loses only the rows written since.
COMMIT_SECONDS = 10.0

Layout = Sequence[tuple[tuple[int, ...], torch.dtype]]


class Files:
    """One file a tensor, mapped and shared; `entries` are the rows int64 [R, 4] that were committed.

    A row's data is brought to disk first (msync), then its line in the journal. From then on the row counts.
    Opening reads all rows. A row whose checksum differs does not count any more; `damaged` says how many there are.

    Args:
        layout: shape and dtype of each tensor.
        fingerprint: of what the rows are of.
        by_position: of each tensor whether a row lies at its positions, not at its number.

    Raises:
        ValueError: another process has the folder open.
        OSError: there is not enough room on the disk. Nothing was written.
    """

    def __init__(self, folder: Path, layout: Layout, fingerprint: str, by_position: Sequence[bool]) -> None:
        self.folder, self._by_position, self.damaged = Path(folder), by_position, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"store must not be open elsewhere, another process holds {self.folder}") from error
        described = self.folder / "store.json"
        found = read_json(described)
        # None: nothing was there.
        self.was_emptied: bool | None = None if found is None else not self._holds(found, fingerprint, layout)
        if found is None or self.was_emptied:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        try:
            self._make_room(layout)
            self._maps = [self._mapped(i, _nbytes(*of)) for i, of in enumerate(layout)]
            self.tensors = [
                torch.empty(shape, dtype=dtype, device="cpu") if mapped is None
                else torch.frombuffer(mapped, dtype=dtype).view(shape)
                for mapped, (shape, dtype) in zip(self._maps, layout, strict=True)
            ]  # fmt: skip
            said = {"fingerprint": fingerprint, "layout": [[list(shape), str(dtype)] for shape, dtype in layout]}
            if found != said or self.was_emptied:
                write_whole(described, said)
            self.scales = self._read_scales()
            self._journal = open(self.folder / "rows", "ab")  # noqa: SIM115
            self.entries = self._read_journal()
        except BaseException:
            self._lock.close()
            raise
        self._pending: list[Tensor] = []
        self._committed_at = time.monotonic()

    def wrote(self, entries: Tensor) -> None:
        """Notes rows int64 [R, 4] whose data has been written to the tensors."""
        self._pending.append(entries)
        if time.monotonic() - self._committed_at > COMMIT_SECONDS:
            self.commit()

    def save_scales(self, scales: dict) -> None:
        """Brings the scales to disk. That must come before any row that needs the scales."""
        if scales != self.scales:
            write_whole(self.folder / "scales.json", {"scales": scales, "checksum": _checksum_of(scales)})
            self.scales = scales

    def commit(self) -> None:
        """Returns once everything that was written is on disk and in the journal."""
        self._committed_at = time.monotonic()
        if not self._pending:
            return
        for mapped in self._maps:
            if mapped is not None:
                mapped.flush()
        pending, self._pending = torch.cat(self._pending), []
        records = (struct.pack("<4qI", *row, self._checksum(*row)) for row in pending.tolist())
        self._journal.write(b"".join(record + struct.pack("<I", zlib.crc32(record)) for record in records))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def clear(self) -> None:
        """From now on no row counts any more."""
        self._pending, self.scales = [], {}
        self._journal.truncate(0)
        os.fsync(self._journal.fileno())
        (self.folder / "scales.json").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmaps the files and lets others open them."""
        self.tensors, self._maps = [], []  # unmapped with the last tensor that looks into them
        self._journal.close()
        self._lock.close()

    def _holds(self, found: dict, fingerprint: str, layout: Layout) -> bool:
        """Whether files described as `found` are whole, and become files of this layout by growing."""
        if found.get("fingerprint") != fingerprint or len(found.get("layout", ())) != len(layout):
            return False
        pairs = zip(found["layout"], layout, strict=True)
        for i, (((rows, *unit), name), ((length, *shape), dtype)) in enumerate(pairs):
            if rows > length or unit != shape or name != str(dtype):
                return False
            path, size = self.folder / f"column-{i}", _nbytes((rows, *unit), dtype)
            if size and not (path.exists() and path.stat().st_size >= size):
                return False  # a copy that was cut off
        return True

    def _make_room(self, layout: Layout) -> None:
        paths = [self.folder / f"column-{i}" for i in range(len(layout))]
        needed = sum(_nbytes(*of) for of in layout)
        present = sum(path.stat().st_blocks * 512 for path in paths if path.exists())
        free = shutil.disk_usage(self.folder).free
        if needed - present > free:
            raise OSError(
                f"store needs {needed:,} bytes in {self.folder}, {free + present:,} are free: "
                "pass limit=, fewer views=, or dtype=torch.int8"
            )

    def _mapped(self, i: int, size: int) -> mmap.mmap | None:
        if not size:
            return None
        file = os.open(self.folder / f"column-{i}", os.O_RDWR | os.O_CREAT)
        try:
            # The room is really taken: writing into a hole of a file on a full disk would kill the process.
            os.posix_fallocate(file, 0, size)
            return mmap.mmap(file, size)
        finally:
            os.close(file)

    def _read_scales(self) -> dict:
        path = self.folder / "scales.json"
        saved = read_json(path) or {"scales": {}, "checksum": _checksum_of({})}
        if saved.get("checksum") != _checksum_of(saved.get("scales")):
            raise _damaged(path)
        return saved["scales"]

    def _read_journal(self) -> Tensor:
        data, entries, whole = (self.folder / "rows").read_bytes(), [], bytearray()
        for start in range(0, len(data) - RECORD.size + 1, RECORD.size):
            record = data[start : start + RECORD.size]
            *entry, of_data, checksum = RECORD.unpack(record)
            if zlib.crc32(record[:-4]) != checksum:
                break  # what was written last was cut off
            if self._checksum(*entry) == of_data:
                entries.append(entry)
                whole += record
            else:
                self.damaged += 1
        if whole != data:
            self._journal.truncate(0)
            self._journal.write(whole)
            self._journal.flush()
            os.fsync(self._journal.fileno())
        return torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, 4)

    def _checksum(self, key: int, row: int, first: int, count: int) -> int:
        """Of a row's data in all files."""
        checksum, row = 0, row & ((1 << ORIGIN_BIT) - 1)
        for mapped, tensor, by_position in zip(self._maps, self.tensors, self._by_position, strict=True):
            if mapped is not None:
                size = tensor[0].nbytes
                start, rows = (first, count) if by_position else (row, 1)
                checksum = zlib.crc32(memoryview(mapped)[start * size : (start + rows) * size], checksum)
        return checksum


def _checksum_of(scales: Any) -> int:
    return zlib.crc32(json.dumps(scales).encode())


def _nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def read_json(path: Path) -> dict | None:
    """-> the dict that a file holds, None where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> ValueError:
    return ValueError(f"store must hold what was written there, {path} is damaged: delete its folder")


def write_whole(path: Path, content: dict) -> None:
    """Writes a file so that it is there whole or not at all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # another process may write it too
    with open(fresh, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def claim(folder: Path, described: dict) -> None:
    """Claims the folder for the views that `described` describes.

    Raises:
        ValueError: the folder holds rows of other views.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "views.json"
    found = read_json(path) or described
    if found != described:
        differ = ", ".join(k for k in described if found.get(k) != described[k])
        raise ValueError(
            f"store must be of the same views, {folder} differs in {differ}: it is of {found}, here {described}"
        )
    write_whole(path, described)
