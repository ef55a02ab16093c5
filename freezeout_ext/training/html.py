"""Runs and comparisons as one HTML page that holds its charts, so that it can be read and sent on without a network."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from . import plot
from .run_folder import RunFolder, read_json, write_atomically
from .tables import Table, comparison_blocks, run_blocks, what_was_trained
from .values import metric_of, metric_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches of a chart: as wide as a phone, so that its letters are as large there as the text.
PHONE = 4.8
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid var(--line); padding-top: 1.5rem; }
p { overflow-wrap: anywhere; } .line { margin: .3rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th:not(:first-child) { background: var(--soft); }
figure { margin: 1rem 0; } img { width: 100%; max-width: 36rem; background: white; }
.verdict { font-size: 1.1rem; font-weight: 600; }
@media (max-width: 40rem) { body { margin: .5rem; padding: 0; font-size: 14px; } th, td { padding: .2rem .4rem; } }
.warning { border-left: 4px solid #d80; padding-left: .7rem; } .quiet { opacity: .75; }
"""


def write_report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Writes `out`, one self-contained page with a section for each folder of a run or a comparison.

    Raises:
        ValueError: a folder holds neither, or a run without an epoch; nothing was written.
    """
    sections = [_section(Path(folder)) for folder in folders]
    title = "FreezeOut: " + ", ".join(Path(folder).name for folder in folders)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{''.join(sections)}</body>\n</html>\n"
    )
    write_atomically(Path(out), lambda file: file.write(page.encode()))


def _section(folder: Path) -> str:
    parts, blocks = [f"<h2>{escape(folder.name)}</h2>"], []
    if (folder / "compare.json").exists():
        summary = read_json(folder / "compare.json")
        *blocks, won = comparison_blocks(summary, all_phases=True)
        parts.append(f'<p class="verdict">{escape(str(won))}</p>')
        figure, about = plot.plot_comparison(folder, summary, width=PHONE), "the metric over seconds, and over the cost"
        config, conditions = summary["config"], summary["conditions"]
    else:
        run = RunFolder(folder)
        rows = run.read_log()
        if not rows:
            raise ValueError(
                f"run must be the folder of a comparison or of a run with at least one epoch, got {folder}"
            )
        config, result = run.load_config().to_dict(), run.load_result()
        conditions = result["conditions"] if result else {}
        last, metric = rows[-1], metric_of(rows[-1])
        so_far = f"not finished: epoch {last['epoch']}, test {metric} {metric_text(metric, last[f'test_{metric}'])}"
        blocks = [what_was_trained(config), *(run_blocks(result) if result else [so_far])]
        figure = plot.plot_run(rows, folder.name, width=PHONE)
        about = "loss, metric, learning rates, frozen layers, time"
    parts += [_chart(figure, about), *map(_block, blocks)]
    where = "; ".join(f"{name} {value}" for name, value in conditions.items() if value is not None)
    return "\n".join([*parts, f'<p class="quiet">{escape(where)}</p>', _config(config)]) + "\n"


def _block(block: str | Table) -> str:
    if isinstance(block, Table):
        return _table(block.rows)
    return "\n".join(
        f'<p class="{"warning" if line.startswith("warning: ") else "line"}">{escape(line)}</p>'
        for line in block.splitlines()
    )


def _config(config: dict) -> str:
    rows = [("field", "value"), *((name, str(value)) for name, value in config.items())]
    return f"<details><summary>Configuration</summary>{_table(rows)}</details>"


def _table(rows: Iterable[Sequence[str]]) -> str:
    header, *body = rows
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in body)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>"


def _chart(figure: "Figure", alt: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></figure>'
