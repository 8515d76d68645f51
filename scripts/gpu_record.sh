#!/usr/bin/env bash
# Measures everything that is claimed of a GPU on the one of this machine, inside a time budget: device, GPU tests,
# attention, training step, optimizer offload, decoding; then draws the pictures and writes docs/results.md. Each
# result is stored as soon as it is there. Run it again, and it goes on where it stopped.
#
#   bash scripts/gpu_record.sh [--out DIR] [--minutes M] [--stages NAME …] [--plan] [--toy] [--python PATH]
#
# --out DIR       directory of the rows (default benchmarks/results; the page is then DIR/results.md for another)
# --minutes M     time budget (default 30)
# --stages NAME … only these of what --plan lists, and pictures and page
# --plan          say what would run, and for how long
# --toy           all of it on the CPU at toy sizes, in minutes; needs --out, since these are no measurements
# --python PATH   a Python that has what is needed, in place of the .venv that is made otherwise
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

INTERPRETER='' WORDS=()
while (($#)); do
    case $1 in
        -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        --python)
            INTERPRETER=$(type -P "${2:-}") || die "--python ${2:-}: must be a Python that runs"
            [[ $INTERPRETER == /* ]] || INTERPRETER=$PWD/$INTERPRETER
            shift 2
            ;;
        --out)
            (($# > 1)) || die "--out: needs a value"
            WORDS+=(--out "$(realpath -m "$2")")
            shift 2
            ;;
        *) WORDS+=("$1") && shift ;;
    esac
done
if [[ -z $INTERPRETER ]]; then
    enter_environment dev
    INTERPRETER=python
fi
cd "$ROOT"
exec "$INTERPRETER" -m benchmarks.record "${WORDS[@]}"
