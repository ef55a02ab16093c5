"""Stores against a plain dictionary of tensors; on disk a kill at any moment leaves no torn row."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freezeout_ext.features.columns import Column
from freezeout_ext.features.rounding import BOUNDS
from freezeout_ext.features.store import Store
from freezeout_ext.features.watch import Refused

KEYS = 40


def batch_of(keys, shape, dtype, *, channels_last=False):
    """Rows that a key's number decides, so that a wrong row shows."""
    generator = torch.Generator(device="cpu")
    rows = torch.stack([torch.randn(shape, generator=generator.manual_seed(int(key))) * (1 + int(key)) for key in keys])
    if dtype == torch.int64:
        rows = (rows * 100).to(dtype)
    rows = rows.to(dtype)
    return rows.contiguous(memory_format=torch.channels_last) if channels_last else rows


@pytest.mark.parametrize("on_disk", [False, True])
@given(
    calls=st.lists(st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=9, unique=True), min_size=1, max_size=8),
    rows=st.integers(1, KEYS),
    shape=st.sampled_from([(), (3,), (4, 2), (3, 2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    reopened=st.integers(0, 8),
)
@settings(max_examples=60)
def test_a_store_gives_what_a_dictionary_gives(tmp_path_factory, on_disk, calls, rows, shape, dtype, reopened):
    folder = tmp_path_factory.mktemp("store") if on_disk else None
    kept = {}
    columns = [Column.like(batch_of([0], shape, dtype)), Column.like(batch_of([0], (2,), torch.float32))]
    store = Store(columns, KEYS, rows, "cpu", folder=folder)
    for i, keys in enumerate(calls):
        if on_disk and i == reopened:
            store.close()
            store = Store(columns, KEYS, rows, "cpu", folder=folder)
            assert store.files.was_emptied is False
        keys = torch.tensor(keys)
        values = batch_of(keys, shape, dtype), batch_of(keys + 1000, (2,), torch.float32)
        added = store.put(keys, values)
        new = [k for k in keys.tolist() if k not in kept][: rows - len(kept)]
        assert added == len(new)
        kept |= {k: [v[keys.tolist().index(k)] for v in values] for k in new}
        assert store.has(torch.arange(KEYS)).tolist() == [k in kept for k in range(KEYS)]
        assert store.keys().tolist() == sorted(kept)
        wanted = torch.tensor(sorted(kept), dtype=torch.int64).flip(0)
        if len(wanted):
            for column, found in enumerate(store.gather(wanted)):
                assert torch.equal(found, torch.stack([kept[k][column] for k in wanted.tolist()]))
    assert store.bytes == len(kept) * sum(column.row_bytes() for column in columns)
    store.close()


@given(
    calls=st.lists(st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=6, unique=True), min_size=1, max_size=6),
    positions=st.integers(1, 60),
    kept_dtype=st.sampled_from([None, torch.int8]),
)
def test_rows_of_different_length_come_back_without_their_padding_and_padded_to_the_batch(calls, positions, kept_dtype):
    columns = [Column.like(batch_of([0], (5, 3), torch.float32), kept_dtype, padded=True)]
    store, kept = Store(columns, KEYS, KEYS, "cpu", positions=positions), {}
    for keys in calls:
        keys = torch.tensor(keys)
        lengths = keys % 5 + 1
        values = batch_of(keys, (int(lengths.max()), 3), torch.float32)
        store.put(keys, [values], lengths)
        for key, row, length in zip(keys.tolist(), values, lengths.tolist(), strict=True):
            if bool(store.has(torch.tensor([key]))):
                kept.setdefault(key, row[:length])
    assert len(store) == len(kept) and sum(map(len, kept.values())) <= positions
    if kept:
        wanted = torch.tensor(list(kept))
        assert store.lengths(wanted).tolist() == [len(kept[k]) for k in wanted.tolist()]
        (found,) = store.gather(wanted, length=7)
        assert found.shape == (len(kept), 7, 3)
        (allowed,) = store.allowed(wanted, [found])
        for row, key, bound in zip(found, kept, allowed if kept_dtype else torch.zeros(len(found)), strict=True):
            assert (row[: len(kept[key])] - kept[key]).abs().max() <= bound
            assert not row[len(kept[key]) :].any()


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(), (6,), (5, 6), (4, 3, 3)])
def test_a_smaller_dtype_rounds_within_its_bound_also_where_later_rows_are_a_hundred_times_larger(kept, shape):
    store = Store([Column.like(batch_of([0], shape, torch.float32), kept)], KEYS, KEYS, "cpu")
    for keys in (torch.arange(8), torch.arange(8, 20)):
        values = batch_of(keys, shape, torch.float32) * (100 if keys[0] else 1)
        assert store.put(keys, [values]) == len(keys)
        (found,) = store.gather(keys)
        assert found.dtype == torch.float32
        (allowed,) = store.allowed(keys, [values])
        error = (found - values).abs().flatten(1).amax(1) if shape else (found - values).abs()
        assert (error <= allowed).all()
        assert error.any() or not shape  # a row of one number is that number
        largest = values.abs().flatten(1).amax(1) if shape else values.abs()
        assert (allowed <= 2 * BOUNDS[kept] * largest).float().mean() > 0.7  # and the bound says something


def test_int8_keeps_quiet_channels_fine_in_either_memory_format():
    for channels_last in (False, True):
        x = batch_of(range(8), (4, 5, 5), torch.float32, channels_last=channels_last)
        x = x * torch.tensor([1.0, 1e-2, 1e-4, 1.0]).view(4, 1, 1)
        store = Store([Column.like(x, torch.int8)], KEYS, KEYS, "cpu")
        store.put(torch.arange(8), [x])
        (found,) = store.gather(torch.arange(8))
        error = (found - x).abs().amax((0, 2, 3)) / x.abs().amax((0, 2, 3))
        assert (error <= 2 / 127).all()


def test_gathered_batches_have_the_strides_of_computed_ones():
    x = batch_of(range(4), (3, 5, 5), torch.float32, channels_last=True)
    store = Store([Column.like(x)], KEYS, KEYS, "cpu")
    store.put(torch.arange(4), [x])
    (found,) = store.gather(torch.tensor([2, 0, 3]))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, x[[2, 0, 3]])


def test_rows_of_another_shape_or_dtype_are_not_kept_and_missing_keys_are_an_error():
    store = Store([Column.like(torch.zeros(2, 3))], KEYS, KEYS, "cpu")
    for rows in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(Refused, match="another shape or dtype"):
            store.put(torch.tensor([1, 2]), [rows])
    assert store.put(torch.tensor([1, -2]), [torch.ones(2, 3)]) == 1
    with pytest.raises(KeyError, match="1 of 2 are not"):
        store.gather(torch.tensor([1, 2]))


@pytest.mark.parametrize("where", ["memory", "large pages", "disk"])
@pytest.mark.parametrize("kept", [None, torch.int8])
def test_a_store_that_grows_keeps_what_it_has_and_takes_more(tmp_path, monkeypatch, where, kept):
    on_disk = where == "disk"
    folder = tmp_path if on_disk else None
    if where == "large pages":
        monkeypatch.setattr("freezeout_ext.features.store.LARGE", 1)
    columns = [
        Column.like(batch_of([0], (4, 3), torch.float32), kept),
        Column.like(batch_of([0], (5, 3), torch.float32), kept, padded=True),
    ]

    def rows_of(keys):
        return [batch_of(keys, (4, 3), torch.float32), batch_of(keys, (5, 3), torch.float32)]

    store = Store(columns, KEYS, 4, "cpu", positions=20, folder=folder, fingerprint="f")
    first, second, lengths = torch.arange(4), torch.arange(4, 10), torch.full((6,), 5)
    assert store.put(first, rows_of(first), lengths[:4]) == 4 and store.put(second, rows_of(second), lengths) == 0
    before = store.gather(first)
    store.grow(10, 50)
    assert store.put(second, rows_of(second), lengths) == 6
    for a, b in zip(store.gather(first), before, strict=True):
        assert torch.equal(a, b)
    after = store.gather(torch.arange(10))
    store.close()
    if on_disk:  # as it is, and larger still
        for size in (10, 12):
            store = Store(columns, KEYS, size, "cpu", positions=5 * size, folder=folder, fingerprint="f")
            assert store.files.was_emptied is False
            assert all(map(torch.equal, store.gather(torch.arange(10)), after))
            store.close()
        store = Store(columns, KEYS, 4, "cpu", positions=20, folder=folder, fingerprint="f")
        assert store.files.was_emptied is True
        store.close()


def test_another_fingerprint_empties_the_files_and_a_second_process_is_refused(tmp_path):
    columns = [Column.like(torch.zeros(2, 3))]
    first = Store(columns, KEYS, KEYS, "cpu", folder=tmp_path, fingerprint="a")
    first.put(torch.tensor([1, 2]), [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="another process"):
        Store(columns, KEYS, KEYS, "cpu", folder=tmp_path, fingerprint="a")
    first.close()
    again = Store(columns, KEYS, KEYS, "cpu", folder=tmp_path, fingerprint="a")
    assert again.files.was_emptied is False and len(again) == 2
    again.close()
    other = Store(columns, KEYS, KEYS, "cpu", folder=tmp_path, fingerprint="b")
    assert other.files.was_emptied is True and len(other) == 0
    other.close()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kept", [None, torch.int8])
def test_a_row_that_was_damaged_on_the_disk_does_not_count_and_is_written_anew(tmp_path, kept, padded):
    batch, keys = torch.randn(4, 3, 5), torch.arange(4)
    columns, lengths = [Column.like(batch, kept, padded=padded)], torch.full((4,), 3) if padded else None

    def opened():
        return Store(columns, KEYS, KEYS, "cpu", positions=3 * KEYS, folder=tmp_path, fingerprint="a")

    store = opened()
    store.put(keys, [batch], lengths)
    (expected,) = store.gather(keys)
    store.close()
    size = columns[0].row_bytes(3) - (4 if kept else 0)
    for damaged, others in ((3, [0, 1, 2]), (1, [0, 2, 3])):  # the last row, whose place is used again, and another
        place = damaged * size + 7
        data = bytearray((tmp_path / "column-0").read_bytes())
        data[place] ^= 16
        (tmp_path / "column-0").write_bytes(data)
        store = opened()
        assert store.files.damaged == 1 and store.keys().tolist() == others
        assert torch.equal(store.gather(torch.tensor(others))[0], expected[others])
        store.put(keys, [batch], lengths)
        assert torch.equal(store.gather(keys)[0], expected)
        store.close()
        store = opened()
        assert store.files.damaged == 0 and torch.equal(store.gather(keys)[0], expected)
        store.close()


def test_scales_that_were_damaged_are_an_error(tmp_path):
    columns = [Column.like(torch.zeros(2, 3), torch.int8)]
    store = Store(columns, KEYS, KEYS, "cpu", folder=tmp_path, fingerprint="a")
    store.put(torch.tensor([1, 2]), [torch.randn(2, 3)])
    store.close()
    scales = tmp_path / "scales.json"
    text = scales.read_text()
    digit = next(i for i, c in enumerate(text) if c in "123456")
    scales.write_text(text[:digit] + "7" + text[digit + 1 :])
    with pytest.raises(ValueError, match=r"scales\.json is damaged"):
        Store(columns, KEYS, KEYS, "cpu", folder=tmp_path, fingerprint="a")
    scales.write_text(text)
    Store(columns, KEYS, KEYS, "cpu", folder=tmp_path, fingerprint="a").close()


def test_too_little_room_on_disk_is_said_with_the_bytes_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match=r"needs 4,004,000,000,000 bytes"):
        Store([Column.like(torch.zeros(1, 10**9))], 10**3, 10**3 + 1, "cpu", folder=tmp_path)
    assert not list(tmp_path.glob("column-*"))


CHILD = """
    import sys, torch
    from freezeout_ext.features import files
    from freezeout_ext.features.columns import Column
    from freezeout_ext.features.store import Store
    files.COMMIT_SECONDS = 0.002
    torch.set_num_threads(1)
    store = Store([Column.like(torch.zeros(1, 1000), kept)], 5000, 5000, "cpu", folder=sys.argv[1], fingerprint="f")
    present = int(store.has(torch.arange(5000)).sum())
    print("open", present, flush=True)
    for first in range(present // 4 * 4, 5000, 4):
        keys = torch.arange(first, first + 4)
        store.put(keys, [keys[:, None].float().expand(4, 1000) + 1])
    print("done", flush=True)
    store.close()
"""


@pytest.mark.parametrize("kept", [None, torch.int8])
def test_a_process_killed_at_any_moment_leaves_only_whole_rows_and_goes_on(tmp_path, kept):
    script = f"import torch\nkept = {kept}\n" + textwrap.dedent(CHILD)
    columns, present = [Column.like(torch.zeros(1, 1000), kept)], 0
    for wait in (0.001, 0.02, 0.08):
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline().startswith("open")
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        # A torn last record, as a power cut may leave it.
        with open(tmp_path / "rows", "ab") as journal:
            journal.write(b"torn")
        store = Store(columns, 5000, 5000, "cpu", folder=tmp_path, fingerprint="f")
        assert store.files.was_emptied is False
        keys = store.keys()
        assert len(keys) >= present
        present = len(keys)
        if present:
            (found,) = store.gather(keys)
            expected = (keys[:, None].float() + 1).expand(-1, 1000)
            assert torch.allclose(found, expected, rtol=0 if kept is None else 1e-6, atol=0)
        store.close()
    assert present
