#!/usr/bin/env bash
# Formatting, lint and tests. Arguments go to pytest: `bash scripts/test.sh tests/data -k worker`.
# Tests that need a GPU run where there is one. Two files at a time, long ones first; `-n 0` for one after the
# other.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"
enter_environment dev

say "ruff"
ruff format --check .
ruff check .
say "pytest $*"
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
