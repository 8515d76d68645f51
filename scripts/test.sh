#!/usr/bin/env bash
# Formatting, lint and tests, on the CPU; tests marked `gpu` run where there is one.
#
#   bash scripts/test.sh [--all] [--versions SET | --with-te] [ARGUMENTS OF PYTEST …]
#
# --all            the exhaustive grids, matrices and recipes, too
# --versions SET   tested (default), oldest or newest package versions, each set in an environment of its own
# --with-te        the tests marked `te`, with Transformer Engine, which is compiled into an environment of its
#                  own; they need no GPU
#
# `bash scripts/test.sh tests/data -k worker` runs some of them. Two files run at a time, long ones first;
# `-n 0` runs one after the other.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

VERSIONS=tested WITH_TE='' MARKED='not exhaustive' ARGUMENTS=()
while (($#)); do
    case $1 in
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        --all) MARKED='' && shift ;;
        --with-te) WITH_TE=1 && shift ;;
        --versions)
            (($# > 1)) || refuse "--versions: needs a value: tested, oldest or newest"
            VERSIONS=$2
            shift 2
            ;;
        *) ARGUMENTS+=("$1") && shift ;;
    esac
done
[[ $VERSIONS =~ ^(tested|oldest|newest)$ ]] || refuse "--versions $VERSIONS: must be tested, oldest or newest"
if [[ $WITH_TE ]]; then
    [[ $VERSIONS == tested ]] || refuse "--with-te: only with the tested versions; remove --versions $VERSIONS"
    VERSIONS=te MARKED="te${MARKED:+ and $MARKED}"
fi

enter_environment dev "$VERSIONS"
say "ruff"
ruff format --check .
ruff check .
say "import-linter: the layers of pyproject.toml"
lint-imports --no-cache --no-logo
say "pytest, $VERSIONS versions: $(python - <<'END'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "triton", "megatron-core", "transformers")), sep=", ")
END
)"
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$MARKED" "${ARGUMENTS[@]}"
