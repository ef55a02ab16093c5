"""Items: the entries of batches that a forward from kept features needs all the same: targets, labels, masks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .columns import Column, row_bytes_of
from .frontier import poison
from .serving import Serving
from .store import Store


class Items:
    """The entries of batches that are needed although the features are kept: targets, labels, masks."""

    def __init__(self, serving: Serving) -> None:
        self.template: Any = None
        self._serving = serving
        self._store: Store | None = None
        self._kept: list[int] = []  # leaves that are kept; the others are needless
        self._off = False

    def has(self, keys: Tensor) -> Tensor:
        """-> bool [B]: of which views all is kept that a forward needs besides features."""
        if self._store is None or not self._suffices():
            return torch.zeros(len(keys), dtype=torch.bool, device="cpu")
        return self._store.has(keys)

    def learn(self, keys: Tensor, batch: Any, *, alike: bool) -> None:
        """Keeps what later batches will need of these views.

        Args:
            alike: whether the samples were of one shape before they became a batch.
        """
        if self._off or bool((keys < 0).all()):
            return
        leaves, spec = tree_flatten(batch)
        if not leaves or not all(isinstance(x, Tensor) and x.dim() and len(x) == len(keys) for x in leaves):
            self._off = True  # nothing to take rows of
            return
        if self.template is None:
            self.template = [x[0].detach().clone() for x in leaves], spec
        like, _ = self.template
        same = alike and self.template[1] == spec
        if not same or any((x.shape[1:], x.dtype) != (y.shape, y.dtype) for x, y in zip(leaves, like, strict=True)):
            # Padded batches and the like: nothing says what a sample that is not read would be padded to.
            self._store, self._off = None, True
            return
        needless = self._needless()
        if needless is None:
            return
        if self._store is None or not self._suffices():
            self._kept = [i for i in range(len(leaves)) if i not in needless]
            self._store = self._opened([Column.like(leaves[i]) for i in self._kept])
            self._off = self._store is None
        if self._store is not None:
            self._compare(keys, leaves)
            kept = keys >= 0
            self._store.put(keys[kept], [leaves[i][kept] for i in self._kept])

    def _opened(self, columns: list[Column]) -> Store | None:
        """-> a new store of these; None without room."""
        kept = self._serving.kept
        kept.close_items()
        needed = kept.owned * row_bytes_of(columns)
        if kept.limit is not None and needed > kept.limit // 4:
            kept.note(f"targets take {needed:,} bytes, too much beside the features: all samples are read")
            return None
        folder = None if kept.folder is None else kept.part() / "items"
        kept.items = Store(columns, kept.views.num_keys, kept.owned, "cpu", folder=folder, fingerprint="items")
        return kept.items

    def _compare(self, keys: Tensor, leaves: list[Tensor]) -> None:
        """
        Raises:
            RuntimeError: an entry that was read anew is not what was kept.
        """
        assert self._store is not None  # see `learn`
        known = self._store.has(keys)
        for i, row in zip(self._kept, self._store.gather(keys[known]) if bool(known.any()) else (), strict=False):
            same = (row == leaves[i][known]) | ((row != row) & (leaves[i][known] != leaves[i][known]))
            if not bool(same.all()):
                sample = int(self._serving.views.samples(keys[known][~same.view(len(same), -1).all(1)][0]))
                raise RuntimeError(
                    f"kept targets (or other entries) of sample {sample} differ from the same view read anew: the data "
                    "set was changed; make a new cache"
                )

    def merge(self, keys: Tensor, skipped: Tensor, found: Any) -> Any | None:
        """What was found, kept entries and poison for the rest, as one batch; None where their shapes differ."""
        template, spec = self.template
        assert self._store is not None  # which has what was skipped
        leaves: list[Any] = [None] * len(template)
        if found is not None:
            leaves, found_spec = tree_flatten(found)
            if found_spec != spec or not all(isinstance(x, Tensor) for x in leaves):
                return None
        rows = dict(zip(self._kept, self._store.gather(keys[skipped]), strict=True))
        whole = []
        for i, (like, some) in enumerate(zip(template, leaves, strict=True)):
            if some is None:
                whole.append(rows[i] if i in rows else poison((len(keys), *like.shape), like.dtype, like.device))
                continue
            if some.shape[1:] != like.shape:
                self._store, self._off = None, True  # see `learn`
                return None
            full = poison((len(keys), *some.shape[1:]), some.dtype, some.device).clone()
            full[~skipped] = some
            if i in rows:
                full[skipped] = rows[i]
            whole.append(full)
        return tree_unflatten(whole, spec)

    def _needless(self) -> set[int] | None:
        """-> the leaves that no forward needs."""
        is_needless = self._serving.needless()
        if self.template is None or is_needless is None:
            return None
        leaves, spec = self.template
        tree = tree_unflatten(list(range(len(leaves))), spec)
        entries = (
            tree.items() if isinstance(tree, Mapping) else enumerate(tree if isinstance(tree, tuple | list) else ())
        )
        return {leaf for place, entry in entries if is_needless(place) for leaf in tree_flatten(entry)[0]}

    def _suffices(self) -> bool:
        """Whether what is not kept is needless."""
        needless = self._needless()
        return needless is not None and set(range(len(self.template[0]))) <= needless | set(self._kept)
