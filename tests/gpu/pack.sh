#!/usr/bin/env bash
# Put into .gpu/ what a GPU machine without a network lacks: wheels, MNIST, and an NCCL that lets several ranks share a
# GPU. PYTHON: a Python with the project's packages, whose NCCL is copied. PYTHON_VERSION: that of the GPU machine.
# MNIST_ROOT: a folder with MNIST's .gz files.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p .gpu/wheels .gpu/data/MNIST/raw
git rev-parse HEAD >.gpu/commit
pins=$(sed -n 's/^\(jsonargparse\|docstring_parser\|typeshed_client\)==\([^;]*\);.*/\1==\2/p' constraints.txt)
# shellcheck disable=SC2086
"$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" -d .gpu/wheels $pins
mnist=${MNIST_ROOT:-../shared/data}/MNIST
[ -d "$mnist/raw" ] && mnist=$mnist/raw
cp "$mnist"/*.gz .gpu/data/MNIST/raw/
chmod -R u+w .gpu
if [ ! -f .gpu/libnccl.so.2.xz ]; then # since NCCL 2.30 ranks may share a GPU; 252 MB become 39
    find_nccl='import nvidia.nccl, pathlib; print(next(pathlib.Path(nvidia.nccl.__path__[0]).rglob("libnccl.so.2")))'
    "$PYTHON" tests/gpu/thin_nccl.py "$("$PYTHON" -c "$find_nccl")" .gpu/libnccl.so.2 "${SM:-90}"
    xz -3 -T1 -f .gpu/libnccl.so.2
fi
du -sh .gpu
