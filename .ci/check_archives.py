"""Usage: check_archives.py WHEEL SDIST   Checks that each holds what it must, and nothing that it must not."""

import sys
import tarfile
import zipfile
from pathlib import Path


def check(archive: str, names: set[str], needed: set[str], forbidden: tuple[str, ...]) -> None:
    missing = sorted(needed - names)
    unwanted = sorted(name for name in names if name.startswith(forbidden))
    if missing or unwanted:
        sys.exit(f"{archive}: missing {missing}, unwanted {unwanted}")
    print(f"{archive}: {len(names)} files, as they should be")


wheel, sdist = sys.argv[1:]
package = {str(path) for path in Path("freezeout_ext").rglob("*.py*") if path.suffix in (".py", ".pyi")}
package.add("freezeout_ext/py.typed")

names = set(zipfile.ZipFile(wheel).namelist())
compiled = {name for name in names if name.startswith("freezeout_ext/_C.") and name.endswith(".so")}
if len(compiled) != 1:
    sys.exit(f"{wheel}: expected one compiled module, found {sorted(compiled)}")
check(wheel, names, package, ("csrc", "tests", "bench", "scripts", "build"))

with tarfile.open(sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
sources = {str(path) for folder in ("csrc", "tests") for path in Path(folder).iterdir() if path.is_file()}
build_files = {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
needed = package | sources | build_files | {"scripts/setup_venv.sh"}
check(sdist, names, needed, ("build", ".venv", "freezeout_ext/_C.c"))
