#!/usr/bin/env bash
# Writes constraints.txt and constraints-oldest.txt: one version of every package, transitive ones too.
#
#   bash scripts/lock.sh
#
# constraints.txt         the tested set, which the scripts install: TESTED below, and the newest of all else
# constraints-oldest.txt  the lower bounds of setup.py, OLDEST below, and the newest of all else
#
# To renew the tested set: change TESTED, run this, then `bash scripts/test.sh --all` and the other two sets
# (`--versions oldest`, `--versions newest`), and note in docs/versions.md what passed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

TESTED='torch==2.14.1
triton==3.8.0
megatron-core==0.19.2
transformers==5.24.0'
# The interpreter of triton 3.6 fails with numpy 2.4 ("only 0-dimensional arrays can be converted").
OLDEST='numpy==2.3.5'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
VENV=$scratch/venv
python=$(find_python)
"$python" -m venv "$VENV"
"$VENV/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9

cd "$ROOT"
lock() { # FILE, options of uv
    local file=$1
    shift
    say "$file"
    "$VENV/bin/uv" pip compile setup.py --extra dev --universal --python-version 3.12 --quiet \
        --custom-compile-command "bash scripts/lock.sh" --no-annotate "$@" --output-file "$scratch/$file"
    mv "$scratch/$file" "$file"
}
printf '%s\n' "$TESTED" >"$scratch/tested.in"
lock constraints.txt --constraints "$scratch/tested.in"
printf '%s\n' "$OLDEST" >"$scratch/oldest.in"
lock constraints-oldest.txt --constraints "$scratch/oldest.in" --resolution lowest-direct
