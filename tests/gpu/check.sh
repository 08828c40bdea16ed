#!/usr/bin/env bash
# Check a GPU in nine minutes and write one receipt:
#   bash tests/gpu/check.sh [--device cpu] [--output DIR] [correct speed ranks]
# On a machine without a network, bring .gpu/, which tests/gpu/pack.sh makes elsewhere. PYTHON: the Python to use.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ "$(uname)" = Linux ]; then # all traffic stays on this machine
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
fi
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 WANDB_MODE=disabled PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
if [ -d .gpu/wheels ] && ! "$PYTHON" -c 'import jsonargparse' 2>/dev/null; then
    "$PYTHON" -m pip install -q --disable-pip-version-check --root-user-action=ignore --no-index --no-deps --no-compile \
        --no-cache-dir --upgrade --target /tmp/site .gpu/wheels/*.whl
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' train/__init__.py)
    needs=$(sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml)
    mkdir -p "/tmp/site/lockstep-$version.dist-info" # for the doctor, because the checkout is not installed here
    printf 'Metadata-Version: 2.1\nName: lockstep\nVersion: %s\nRequires-Python: %s\n' "$version" "$needs" \
        >"/tmp/site/lockstep-$version.dist-info/METADATA"
    export PYTHONPATH=$PYTHONPATH:/tmp/site
fi
if [ -z "${MNIST_ROOT:-}" ] && [ -d .gpu/data ]; then export MNIST_ROOT=$PWD/.gpu/data; fi
if [ -f .gpu/libnccl.so.2.xz ] && [[ " $* " != *" cpu "* ]]; then # unpacked while the first checks run
    export GPU_CHECK_NCCL=/tmp/gpu-check-nccl/libnccl.so.2
    mkdir -p "${GPU_CHECK_NCCL%/*}"
    unpack='import lzma, shutil, sys; shutil.copyfileobj(lzma.open(".gpu/libnccl.so.2.xz"), open(sys.argv[1], "wb"), 1 << 20)'
    ("$PYTHON" -c "$unpack" "$GPU_CHECK_NCCL.$$" && mv "$GPU_CHECK_NCCL.$$" "$GPU_CHECK_NCCL") &
fi
exec "$PYTHON" -m gpu.check --seconds $((550 - SECONDS)) "$@"
