"""Files: tensors mapped from files, a journal of the rows that are on disk, and of which views a folder's rows are."""

import fcntl
import json
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
# Of which views a folder is, and how many of them were decided on.
VIEWS, DECISION = "views.json", "decided.json"


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

    def __init__(
        self,
        folder: Path,
        layout: Sequence[tuple[tuple[int, ...], torch.dtype]],
        fingerprint: str,
        by_position: Sequence[bool],
    ) -> None:
        self.folder, self._by_position, self.damaged = Path(folder), by_position, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"store must not be open elsewhere, another process holds {self.folder}") from error
        self._fingerprint = fingerprint
        said = self._described(layout)
        described = self.folder / "store.json"
        found = read_json(described)
        # None: nothing was there.
        self.was_emptied: bool | None = None if found is None else not self._holds(found, layout)
        if found is None or self.was_emptied:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        try:
            self._maps: list[mmap.mmap | None] = []
            self.tensors: list[torch.Tensor] = []
            self._make_room(layout)
            for i, (shape, dtype) in enumerate(layout):
                self._map(i, shape, dtype)
            if found != said or self.was_emptied:
                write_whole(described, json.dumps(said))
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
            saved = {"scales": scales, "checksum": _checksum_of(scales)}
            write_whole(self.folder / "scales.json", json.dumps(saved))
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

    def grow(self, layout: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Lengthens the files to these shapes. The present tensors stay in front.

        Raises:
            OSError: there is not enough room on the disk. Nothing was changed.
        """
        self.commit()
        self._make_room(layout)
        self.tensors, self._maps = [], []
        for i, (shape, dtype) in enumerate(layout):
            self._map(i, shape, dtype)
        write_whole(self.folder / "store.json", json.dumps(self._described(layout)))

    def close(self) -> None:
        """Unmaps the files and lets others open them."""
        self.tensors, self._maps = [], []  # unmapped with the last tensor that looks into them
        self._journal.close()
        self._lock.close()

    def _holds(self, found: dict, layout: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> bool:
        """Whether files described as `found` are whole, and become files of this layout by growing."""
        if found.keys() != {"fingerprint", "layout"} or not _grows_to(found, self._described(layout)):
            return False
        for i, ((shape, _), (_, dtype)) in enumerate(zip(found["layout"], layout, strict=True)):
            path, size = self.folder / f"column-{i}", _nbytes(shape, dtype)
            if size and not (path.exists() and path.stat().st_size >= size):
                return False  # a copy that was cut off
        return True

    def _described(self, layout: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> dict:
        return {"fingerprint": self._fingerprint, "layout": [[list(shape), str(dtype)] for shape, dtype in layout]}

    def _make_room(self, layout: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        needed = present = 0
        for i, (shape, dtype) in enumerate(layout):
            path = self.folder / f"column-{i}"
            needed += _nbytes(shape, dtype)
            present += path.stat().st_blocks * 512 if path.exists() else 0
        free = shutil.disk_usage(self.folder).free
        if needed - present > free:
            raise OSError(
                f"store needs {needed:,} bytes in {self.folder}, {free + present:,} are free: "
                "pass limit=, fewer views=, or dtype=torch.int8"
            )

    def _map(self, i: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = _nbytes(shape, dtype)
        if not size:
            self._maps.append(None)
            self.tensors.append(torch.empty(shape, dtype=dtype, device="cpu"))
            return
        file = os.open(self.folder / f"column-{i}", os.O_RDWR | os.O_CREAT)
        try:
            # The room is really taken: writing into a hole of a file on a full disk would kill the process.
            os.posix_fallocate(file, 0, size)
            mapped = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._maps.append(mapped)
        self.tensors.append(torch.frombuffer(mapped, dtype=dtype).view(shape))

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


def _grows_to(found: dict, said: dict) -> bool:
    """Whether files of the layout `found` become files of the layout `said` by growing."""
    longer = [one[0][:1] <= two[0][:1] for one, two in zip(found["layout"], said["layout"], strict=False)]
    units = [[[layout[0][1:], layout[1]] for layout in each["layout"]] for each in (found, said)]
    return found["fingerprint"] == said["fingerprint"] and units[0] == units[1] and all(longer)


def _checksum_of(scales: Any) -> int:
    return zlib.crc32(json.dumps(scales).encode())


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


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


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # another process may write it too
    with open(fresh, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def claim(folder: Path, described: dict) -> None:
    """Claims the folder for the views that `described` describes.

    Raises:
        ValueError: the folder holds rows of other views.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / VIEWS
    found = read_json(path) or described
    if found != described:
        differ = ", ".join(k for k in described if found.get(k) != described[k])
        raise ValueError(
            f"store must be of the same views, {folder} differs in {differ}: it is of {found}, here {described}"
        )
    write_whole(path, json.dumps(described))


def decided(folder: Path) -> dict | None:
    """-> what was decided for the folder's rows, None where nothing was decided."""
    return read_json(folder / DECISION)


def decide(folder: Path, decision: dict) -> None:
    """Writes what was decided beside the folder's rows."""
    write_whole(folder / DECISION, json.dumps(decision))
