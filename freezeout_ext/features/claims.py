"""Claims: what a folder's rows are views of, and how many views of each sample were decided for them."""

import json
from pathlib import Path

from .files import write_whole

VIEWS, DECISION = "views.json", "decided.json"


def claim(folder: Path, described: dict) -> None:
    """Claims the folder for the views that `described` describes.

    Raises:
        ValueError: the folder holds rows of other views.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / VIEWS
    found = json.loads(path.read_text()) if path.exists() else described
    if found != described:
        differ = ", ".join(k for k in described if found.get(k) != described[k])
        raise ValueError(
            f"store must be of the same views, {folder} differs in {differ}: it is of {found}, here {described}"
        )
    path.write_text(json.dumps(described))


def decided(folder: Path) -> dict | None:
    """-> what was decided for the folder's rows, None where nothing was decided."""
    path = folder / DECISION
    return json.loads(path.read_text()) if path.exists() else None


def decide(folder: Path, decision: dict) -> None:
    """Writes what was decided beside the folder's rows."""
    write_whole(folder / DECISION, json.dumps(decision))
