# The environment of the scripts: finds a Python, makes .venv, installs this package into it.
#
# Sourced, not run. `enter_environment EXTRAS [VERSIONS]` (extras of setup.py, such as dev) leaves the
# caller in the root of the repository with the environment first on PATH. Only what is missing is
# done, each step is announced in one line, and a run that was interrupted is made good by the next.
#
# VERSIONS is a set of package versions, each with an environment of its own:
#   tested   constraints.txt, in .venv (the default)
#   oldest   constraints-oldest.txt, in .venv-oldest
#   newest   the newest releases that setup.py allows, looked up once a day, in .venv-newest
#   te       the tested ones and Transformer Engine, constraints-te.txt, in .venv-te
#
# PYTHON             the Python to make the environment with, instead of searching for one
# MEGATRON_S2_VENV   absolute path of the environment; for .ci/run, which makes one from nothing

ROOT=$(cd "${BASH_SOURCE[0]%/*}/../.." && pwd -P)

say() { printf '== %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# For bad arguments.
refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Prints "MINOR yes|no", the second: can it make environments? Fails below 3.12, or if it does not run.
probe_python() {
    "$1" -c '
import sys
from importlib.util import find_spec

if sys.version_info < (3, 12):
    sys.exit(1)
print(sys.version_info[1], "yes" if find_spec("venv") and find_spec("ensurepip") else "no")
' 2>/dev/null </dev/null
}

# Every candidate, one per line: those on PATH in its order (a name may be there and still not run,
# as pyenv's shims do), then pyenv's own. None from the environment that is to be made.
list_pythons() {
    local name minor candidate
    {
        for name in python3 python; do type -aP "$name" || true; done
        for minor in {12..20}; do type -aP "python3.$minor" || true; done
        for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
            if [[ -x $candidate ]]; then printf '%s\n' "$candidate"; fi
        done
    } | while IFS= read -r candidate; do
        if [[ $candidate != "$VENV"/* ]]; then printf '%s\n' "$candidate"; fi
    done
}

# Prints the path of the Python to use: $PYTHON, or the lowest version >= 3.12 there is, because the
# packages needed have wheels for the older ones first.
find_python() {
    local candidate found minor complete best= best_minor=999 incomplete=
    if [[ -n ${PYTHON:-} ]]; then
        found=$(probe_python "$PYTHON") || die "PYTHON=$PYTHON: must be a Python >= 3.12 that runs"
        [[ $found == *yes ]] || die "PYTHON=$PYTHON: cannot make environments: its venv or ensurepip is" \
            "missing; on Debian and Ubuntu: sudo apt install python3.${found% *}-venv"
        type -P "$PYTHON"
        return
    fi
    while IFS= read -r candidate; do
        found=$(probe_python "$candidate") || continue
        read -r minor complete <<<"$found"
        if [[ $complete == no ]]; then
            incomplete=${incomplete:-"$candidate python3.$minor"}
        elif ((minor < best_minor)); then
            best=$candidate best_minor=$minor
        fi
    done < <(list_pythons)
    if [[ -n $best ]]; then
        printf '%s\n' "$best"
    elif [[ -n $incomplete ]]; then
        die "${incomplete% *} cannot make environments: its venv or ensurepip is missing; on Debian and" \
            "Ubuntu: sudo apt install ${incomplete##* }-venv; or set PYTHON to another Python >= 3.12"
    else
        die "no Python >= 3.12 on PATH or in ${PYENV_ROOT:-$HOME/.pyenv}/versions; install one, or set" \
            "PYTHON to its path"
    fi
}

# Does the environment work, was it made at this place (its scripts name it), and was no installation
# into it broken off half-way?
environment_is_sound() {
    [[ ! -e $VENV/.installing ]] && probe_python "$VENV/bin/python" >/dev/null || return 1
    [[ -e $VENV/bin/pip ]] || "$VENV/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 || return 1
    [[ $("$VENV/bin/pip" --version 2>/dev/null) == *" from $VENV/"* ]]
}

make_environment() {
    local python
    python=$(find_python) || exit 1
    if [[ -e $VENV/pyvenv.cfg ]]; then
        say "$VENV is broken or half made: removing it"
        rm -rf "$VENV"
    fi
    say "making $VENV with $python ($("$python" -V))"
    "$python" -m venv "$VENV" || die "$python -m venv $VENV failed"
}

# Installs the package, editable, with the extras $1 in the versions $2, unless that was done for this
# very setup.py and these constraints.
install_package() {
    local stamp=$VENV/.installed-$1 versions=() also checksum
    case $2 in
        tested) also=$(<"$ROOT/constraints.txt") versions=(--constraint "$ROOT/constraints.txt") ;;
        oldest) also=$(<"$ROOT/constraints-oldest.txt") versions=(--constraint "$ROOT/constraints-oldest.txt") ;;
        newest) also=$(date +%F) versions=(--upgrade --upgrade-strategy eager) ;;
        te)
            also=$(<"$ROOT/constraints.txt")$(<"$ROOT/constraints-te.txt")
            versions=(--constraint "$ROOT/constraints.txt")
            ;;
    esac
    checksum=$(printf '%s\n' "$(<"$ROOT/setup.py")" "$also" | cksum)
    if [[ -e $stamp && $(<"$stamp") == "$checksum" ]]; then return; fi
    say "installing megatron-s2 [$1] and what it needs, $2 versions (the first time: minutes, about 5 GB)"
    touch "$VENV/.installing"
    trap 'exit 130' INT TERM # pip failing leaves a sound environment; pip interrupted does not
    if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${versions[@]}" \
        --editable "$ROOT[$1]" || { [[ $2 == te ]] && ! install_transformer_engine; }; then
        rm "$VENV/.installing"
        die "installing into $VENV failed, see above; run this again when that is fixed"
    fi
    trap - INT TERM
    printf '%s\n' "$checksum" >"$stamp"
    rm "$VENV/.installing"
}

# Installs Transformer Engine. Its extension for torch is compiled, because PyPI has no wheel of it, against the
# headers that torch's packages and constraints-te.txt bring: that needs neither a GPU nor CUDA's compiler.
install_transformer_engine() {
    local extension packages sources status=0 pip=("$VENV/bin/python" -m pip --quiet --disable-pip-version-check)
    type -P g++ >/dev/null || {
        say "no g++, which compiles Transformer Engine; on Debian and Ubuntu: sudo apt install g++"
        return 1
    }
    mapfile -t packages < <(grep '^[^#]' "$ROOT/constraints-te.txt" | grep -v '^transformer_engine_torch==')
    extension=$(grep '^transformer_engine_torch==' "$ROOT/constraints-te.txt")
    say "installing and compiling $extension (the first time: 3 minutes of one core, 4 GB of memory)"
    "${pip[@]}" install --no-deps "${packages[@]}" || return 1
    sources=$(mktemp -d)
    compile_extension "$extension" "$sources" || status=1
    rm -rf "$sources"
    return $status
}

# Compiles $1 in the empty directory $2 and installs it. Its 33 source files, each of which would read all of
# torch's headers, become one: that takes 3 minutes instead of 25.
compile_extension() {
    local file
    "${pip[@]}" download --no-deps --no-binary :all: --no-build-isolation --dest "$2" "$1" &&
        tar -xf "$2"/*.tar.gz --strip-components 1 -C "$2" || return 1
    while IFS= read -r file; do
        mv "$file" "$file.in"
        printf '#include "%s"\n' "$file.in"
    done < <(find "$2/csrc" -name '*.cpp' | sort) >"$2/all"
    mv "$2/all" "$2/csrc/all.cpp"
    # Without pip's cache, which would hand out an extension that was compiled for another torch.
    NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 \
        "${pip[@]}" install --no-deps --no-build-isolation --no-cache-dir "$2"
}

enter_environment() {
    local place versions=${2:-tested}
    VENV=${MEGATRON_S2_VENV:-$ROOT/.venv}
    [[ $versions == tested ]] || VENV=$VENV-$versions
    place=$(cd "${VENV%/*}" && pwd -P)
    VENV=$place/${VENV##*/}
    # Two scripts started together must not install into, or remove, one environment at once.
    exec 9<"$place"
    if type -P flock >/dev/null && ! flock --nonblock 9; then
        say "waiting for another script that prepares $VENV"
        flock 9
    fi
    environment_is_sound || make_environment
    install_package "$1" "$versions"
    exec 9<&-
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    unset PYTHONHOME
    cd "$ROOT"
}
