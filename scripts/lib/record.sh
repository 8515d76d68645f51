# Runs the stages of scripts/gpu_record.sh one after another inside a time budget.
#
# Sourced after lib/env.sh, not run. The caller adds stages with `stage` and `drawing`, chooses some with
# `choose_stages`, and calls `print_plan` or `run_stages`. It sets
#   INTERPRETER  the Python that runs the stages
#   LOG          file that gets a line for each stage that ran, fields separated by tabs:
#                date, SETTING, stage, words, result, seconds, limit in seconds, reason
#   SETTING      hash of code, versions and machine: a stage that is done under it is not run again
#   DEADLINE     value of SECONDS at which the last stage has to end

GRACE=20          # seconds between SIGTERM and SIGKILL
DRAWING_LIMIT=300 # seconds

CHOSEN=() DRAWINGS=()
declare -A LEAST MOST IMPOSSIBLE
declare -A WORDS # one per line
CURRENT='' RUNNING='' BEGIN=0 RESULT='' REASON=''

# stage NAME LEAST MOST WORD …: adds a stage that runs INTERPRETER with the words for at most MOST seconds. It is
# not begun with less than LEAST seconds left: that is what its longest part takes, which stores nothing before
# its end. A stage that cannot run has a reason in IMPOSSIBLE.
stage() {
    CHOSEN+=("$1") LEAST[$1]=$2 MOST[$1]=$3
    local IFS=$'\n'
    WORDS[$1]="${*:4}"
}

# drawing NAME WORD …: adds a stage at the end that is no part of the budget and runs in every call.
drawing() {
    DRAWINGS+=("$1")
    local IFS=$'\n'
    WORDS[$1]="${*:2}"
}

# choose_stages NAME …: leaves out all other stages, but no drawing.
choose_stages() {
    local name all=("${CHOSEN[@]}")
    for name; do
        [[ -n ${MOST[$name]:-} ]] || refuse "--stages $name: must be of $(sed 's/ /, /g' <<<"${all[*]}")"
    done
    CHOSEN=()
    for name in "${all[@]}"; do
        if [[ " $* " == *" $name "* ]]; then CHOSEN+=("$name"); fi
    done
}

words_of() { printf '%s' "${WORDS[$1]//$'\n'/ }"; }

is_done() { grep -qsF -- "$SETTING"$'\t'"$1"$'\t'"$(words_of "$1")"$'\t'done$'\t' "$LOG"; }

# limit_of NAME: prints the seconds that a stage may take now; fails if too little time is left.
limit_of() {
    local left=$((DEADLINE - SECONDS))
    ((left >= LEAST[$1])) && printf '%d' $((left < MOST[$1] ? left : MOST[$1]))
}

print_plan() {
    local name limit
    for name in "${CHOSEN[@]}"; do
        limit=$(limit_of "$name") && limit+=" s" || limit="no time"
        if is_done "$name"; then limit="done"; fi
        printf '%-20s %10s  %s\n' "$name" "$limit" "$(words_of "$name")"
    done
    for name in "${DRAWINGS[@]}"; do
        printf '%-20s %10s  %s\n' "$name" "at the end" "$(words_of "$name")"
    done
}

# Runs all chosen stages that are not done, then the drawings. Returns 1 if one failed.
run_stages() {
    local name limit failed=() unfinished=()
    setpriv --pdeathsig TERM true 2>/dev/null || die "setpriv of util-linux >= 2.33 is needed to end stages with this"
    OUTPUT=$(mktemp)
    trap 'rm -f "$OUTPUT"' EXIT
    trap interrupted INT TERM HUP
    mkdir -p "${LOG%/*}"
    for name in "${CHOSEN[@]}"; do
        if is_done "$name"; then
            say "$name: done before"
            continue
        fi
        CURRENT=$name BEGIN=$SECONDS RESULT='' REASON=''
        if [[ -n ${IMPOSSIBLE[$name]:-} ]]; then
            RESULT=failed REASON=${IMPOSSIBLE[$name]} limit=0
        elif limit=$(limit_of "$name"); then
            say "$name: at most $limit s"
            run_stage "$name" "$limit"
        else
            RESULT='not measured' REASON='no time left' limit=0
        fi
        log_stage "$limit"
        case $RESULT in
            failed) failed+=("$name") ;;
            done) ;;
            *) unfinished+=("$name") ;;
        esac
    done
    CURRENT=''
    for name in "${DRAWINGS[@]}"; do
        run_stage "$name" "$DRAWING_LIMIT"
        [[ $RESULT == done ]] || failed+=("$name")
        say "$name: $RESULT${REASON:+: $REASON}"
    done
    if ((${#unfinished[@]})); then say "not finished: ${unfinished[*]}; the same command continues"; fi
    if ((${#failed[@]})); then
        printf 'error: failed: %s; see above and %s\n' "${failed[*]}" "$LOG" >&2
        return 1
    fi
}

# run_stage NAME LIMIT: runs a stage and sets RESULT and REASON.
run_stage() {
    local words status=0 begin=$SECONDS
    mapfile -t words <<<"${WORDS[$1]}"
    run_limited "$2" "${words[@]}" || status=$?
    REASON="exit status $status: $(last_lines)"
    case $status in
        0) RESULT='done' REASON='' ;;
        124) RESULT='out of time' ;;
        137) ((SECONDS - begin >= $2)) && RESULT='out of time' || RESULT=failed ;;
        *) RESULT=failed ;;
    esac
    if [[ $RESULT == 'out of time' ]]; then REASON='its time was up; what it had finished is stored'; fi
    if [[ $1 == tests && $status == 5 ]]; then
        RESULT='not measured' REASON='no test ran: there is no CUDA device'
    fi
}

# run_limited LIMIT WORD …: runs INTERPRETER with the words and shows its output, which stays in OUTPUT.
# Its process group gets SIGTERM after LIMIT seconds, or when this shell ends, however that ends, and SIGKILL GRACE
# seconds later. Returns its exit status; when its time was up 124, or 137 if it had to be killed.
run_limited() {
    local status=0 reader
    : >"$OUTPUT"
    PYTHONUNBUFFERED=1 setpriv --pdeathsig TERM timeout --kill-after "$GRACE" "$1" \
        "$INTERPRETER" "${@:2}" </dev/null >>"$OUTPUT" 2>&1 &
    RUNNING=$!
    tail --pid "$RUNNING" --sleep-interval 0.2 --lines +1 --follow "$OUTPUT" | sed --unbuffered 's/^/   /' &
    reader=$!
    wait "$RUNNING" || status=$?
    kill -KILL -- "-$RUNNING" 2>/dev/null || true # what it started and left behind
    wait "$reader"
    RUNNING=''
    return "$status"
}

# Prints the end of OUTPUT in one line.
last_lines() {
    sed 's/^[[:space:]]*//; s/[[:space:]]*$//; s/\t/ /g; /^$/d' "$OUTPUT" | tail --lines 15 | paste -sd '\t' |
        sed 's/\t/ | /g'
}

# log_stage LIMIT: appends the line of the current stage to LOG.
log_stage() {
    printf '%s\t' "$(date --utc +%FT%TZ)" "$SETTING" "$CURRENT" "$(words_of "$CURRENT")" "$RESULT" \
        $((SECONDS - BEGIN)) "$1" >>"$LOG"
    printf '%s\n' "$REASON" >>"$LOG"
    say "$CURRENT: $RESULT${REASON:+: $REASON}"
}

interrupted() {
    trap '' INT TERM HUP
    if [[ -n $RUNNING ]]; then
        kill "$RUNNING" 2>/dev/null || true
        wait "$RUNNING" || true
        kill -KILL -- "-$RUNNING" 2>/dev/null || true
    fi
    if [[ -n $CURRENT ]]; then
        RESULT=interrupted REASON=''
        log_stage 0
    fi
    printf 'interrupted: what was measured is stored; the same command continues\n' >&2
    exit 130
}
