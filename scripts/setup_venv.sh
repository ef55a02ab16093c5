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
  pip --no-build-isolation --editable ".[$extras]"
  # For the tests of its models: alone, since PyPI's torchvision needs a CUDA build of torch.
  case $extras in *dev*) pip --no-deps timm ;; esac
fi
.venv/bin/python -c 'from freezeout_ext.native import build_info; print("set-up:", build_info())'
