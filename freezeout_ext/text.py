"""Rows as aligned text, and seconds in words."""

from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]], *, left: Iterable[int] = (), rule: bool = True) -> str:
    """The rows as lines of text with aligned columns; the first row is the header.

    Args:
        left: columns that are aligned to the left; the others hold numbers.
        rule: a line of dashes below the header.
    """
    left = set(left)
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(widths[c]) if c in left else cell.rjust(widths[c]) for c, cell in enumerate(row)]
        return "  ".join(cells).rstrip()

    header, *body = rows
    return "\n".join([line(header), *["  ".join("-" * w for w in widths)] * rule, *map(line, body)])


def duration(seconds: float, digits: int = 0) -> str:
    """ "90 s", "12 min", "3.5 h".

    Args:
        seconds: the time.
        digits: behind the point; hours have one at least.
    """
    if seconds < 120:
        return f"{seconds:.{digits}f} s"
    return f"{seconds / 60:.{digits}f} min" if seconds < 7200 else f"{seconds / 3600:.{max(digits, 1)}f} h"
