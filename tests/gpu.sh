#!/usr/bin/env bash
# Everything that only a GPU shows, in one command without a network: bash tests/gpu.sh [flags of tests/gpu.py]
set -euo pipefail
cd "$(dirname "$0")/.."
exec python tests/gpu.py "$@"
