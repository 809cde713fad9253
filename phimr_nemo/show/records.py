"""Rows of a record directory by number, finished or not: narrow columns at once, text when it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.errors import UserError
from phimr_nemo.store.records import KINDS, Kind
from phimr_nemo.store.shards import SHARD_NAME, read_columns, shard_facts

if TYPE_CHECKING:
    import pyarrow as pa

OPEN_SHARDS: Final = 8
"""Shards whose text is kept in memory: a page of a sorted list reads one after the other."""


class Records:
    """A record directory.

    Args:
        path: the directory; shards without a sidecar are still being written and are left out.

    Attributes:
        path: the directory.
        kind: of its records; None where there is no shard yet.
        shards: the files.
        digests: sha256 of each, as its sidecar has it.
        starts: the number of the first row of each shard, and of all rows in the end.

    Raises:
        UserError: a sidecar is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [file for file in path.glob("part-*.parquet") if SHARD_NAME.fullmatch(file.name)]
        self.shards = sorted(
            (file for file in files if file.with_suffix(".json").is_file()),
            key=lambda file: (len(file.name), file.name),
        )
        facts = [shard_facts(file) for file in self.shards]
        self.kind: Kind | None = next((kind for kind in KINDS if facts and kind == facts[0]["kind"]), None)
        self.digests = [str(fact["sha256"]) for fact in facts]
        self.starts = np.cumsum([0, *(int(fact["rows"]) for fact in facts)])
        self._open: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns, one shard after the other.

        Raises:
            UserError: a shard cannot be read.
        """
        assert self.kind is not None
        for file in self.shards:
            yield _read(file, self.kind, columns)

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Whole rows, in the order of `numbers`.

        Raises:
            UserError: a shard cannot be read.
        """
        found: dict[int, dict[str, Any]] = {}
        wanted: npt.NDArray[np.int64] = np.unique(np.asarray(numbers, np.int64))
        places = np.searchsorted(self.starts, wanted, side="right") - 1
        for place in np.unique(places).tolist():
            here = wanted[places == place]
            table = self._shard(place).take(here - self.starts[place])
            found.update(zip(here.tolist(), table.to_pylist(), strict=True))
        return [found[number] for number in numbers]

    def _shard(self, place: int) -> pa.Table:
        if place not in self._open:
            assert self.kind is not None
            self._open[place] = _read(self.shards[place], self.kind, None)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]


def _read(file: Path, kind: Kind, columns: Sequence[str] | None) -> pa.Table:
    """A shard's columns. Checksums are not compared: they would need all of the text."""
    import pyarrow as pa

    try:
        return read_columns(file, kind, columns)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"shard {file} cannot be read: {error}",
            rule="a shard with a sidecar is there and whole",
            remedy=f"run `phimr data check {file.parent}`",
        ) from error
