#!/bin/sh
# Usage: setup_venv.sh EXTRAS   Makes .venv with freezeout_ext[EXTRAS] in it, editable; run from the root of the tree.
#
# Pinned: everything from the package registry, in the versions of constraints.txt.
# Borrowed: where $PYTHON has a torch of its own and the registry cannot be reached (a GPU image without a network),
# .venv sees that Python's packages and installs none.
set -eu
extras=$1
parent=${PYTHON:-python3}
# A user's own pip settings must not send the packages elsewhere.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV

# This machine's cards are enough here, while `pip install .` builds for all. Without one: the oldest that the CUDA
# half's code is written for, whose PTX later ones translate.
if [ -z "${CUDAARCHS:-}" ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then CUDAARCHS=native; else CUDAARCHS=80; fi
  export CUDAARCHS
fi

registry_answers() {
  target=$(mktemp -d)
  "$parent" -m pip download --quiet --no-deps --retries 0 --timeout 15 --dest "$target" \
    --constraint constraints.txt setuptools >"$target/log" 2>&1 && status=0 || status=1
  rm -rf "$target"
  return $status
}

borrowed=.venv/borrowed
if [ ! -x .venv/bin/python ]; then
  if "$parent" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' && ! registry_answers; then
    "$parent" -m venv --without-pip .venv
    "$parent" - <<'PYTHON' >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
import sys
print(*(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))), sep="\n")
PYTHON
    touch $borrowed
  else
    "$parent" -m venv .venv
  fi
fi

if [ -e $borrowed ]; then
  echo "set-up: no network; .venv borrows the packages of $(command -v "$parent"), torch included"
  "$parent" -m pip --python .venv/bin/python install --quiet --no-build-isolation --no-deps --editable .
else
  echo "set-up: .venv gets the versions of constraints.txt from the package registry"
  # Bytecode comes with the first import of a module; compiling all of it here takes minutes.
  pip() { .venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt "$@"; }
  pip cmake ninja pybind11 setuptools
  # What the extras need, by the package's own metadata: downloading takes as long as compiling, so both at once.
  .venv/bin/python - "$extras" >.venv/requirements.txt <<'PYTHON'
import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted, found = sys.argv[1].split(","), list(project["dependencies"])
while wanted:
    for requirement in project["optional-dependencies"][wanted.pop()]:
        if requirement.startswith(project["name"] + "["):
            wanted += requirement.partition("[")[2].rstrip("]").split(",")
        else:
            found.append(requirement)
print(*dict.fromkeys(found), sep="\n")
PYTHON
  .venv/bin/python setup.py --quiet build_ext --inplace >.venv/build.log 2>&1 &
  build=$!
  pip --requirement .venv/requirements.txt
  wait $build || { cat .venv/build.log >&2; exit 1; }
  # The module is built already: this writes the metadata and the command.
  pip --no-build-isolation --no-deps --editable .
  # For the tests of its models: alone, since PyPI's torchvision needs a CUDA build of torch.
  case $extras in *dev*) pip --no-deps timm ;; esac
fi
.venv/bin/python -c 'from freezeout_ext.native import build_info; print("set-up:", build_info())'
