#!/usr/bin/env bash
# Check a GPU in nine minutes and write one receipt: bash tests/gpu/check.sh [--device cpu] [--output DIR] [correct ranks speed]
# On a machine without network, copy .gpu/ along, which tests/gpu/pack.sh makes elsewhere. PYTHON: the Python to use.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 WANDB_MODE=disabled PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
if [ -d .gpu/wheels ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu/wheels/*.whl
    export PYTHONPATH=$PYTHONPATH:/tmp/site
fi
if [ -z "${MNIST_ROOT:-}" ] && [ -d .gpu/data ]; then export MNIST_ROOT=$PWD/.gpu/data; fi
if [ -f .gpu/libnccl.so.2.xz ] && [[ " $* " != *" cpu "* ]]; then # unpacked while the first checks run
    export GPU_CHECK_NCCL=/tmp/gpu-check-nccl/libnccl.so.2
    mkdir -p "${GPU_CHECK_NCCL%/*}"
    (xz -dc .gpu/libnccl.so.2.xz >"$GPU_CHECK_NCCL.$$" && mv "$GPU_CHECK_NCCL.$$" "$GPU_CHECK_NCCL") &
fi
exec "$PYTHON" -m gpu.check --seconds $((550 - SECONDS)) "$@"
