"""table: rows as aligned text, for whatever prints one."""

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
