# The steps of a run, under one deadline. To be sourced.
#
#     begin SECONDS FOLDER            everything ends within so many seconds of the shell's start
#     step NAME LIMIT COMMAND...      at most LIMIT seconds, and no more than are left
#     show NAME LINES PATTERN         the first lines of the step's log that match
#     finish                          says what failed; its status is 1 if anything did
#
# FOLDER gets two files, both written anew after every step: results.tgz, which holds each step's log
# (NAME.log) and whatever the steps wrote to $work, and summary.csv with each step's status and
# seconds. They are complete whether a step fails, is killed, or the whole run gets a SIGTERM.
#
# With LIST=1 steps are named with their limits, and not run.

GRACE=${GRACE:-8}   # seconds from the first signal to SIGKILL
PACE=${PACE:-1}     # limits are times this, where the machine is slower than they are made for
FEWEST=${FEWEST:-5} # a step that has less than this many seconds left is skipped
WIDTH=160           # characters of a line that is shown
# A job of its own process group, which an interrupt reaches: without job control bash starts
# background commands with SIGINT ignored, and Python then never sees it.
set -m

begin() {
    deadline=$1
    folder=$(mkdir -p "$2" && cd "$2" && pwd) || exit 2
    scratch=$(mktemp -d)
    work=$scratch/results
    mkdir "$work"
    echo "step,status,seconds" >"$work/summary.csv"
    running='' failed=() skipped=()
    trap 'cut_off' TERM INT HUP
    trap 'rm -rf "$scratch"' EXIT
}

# Into a new file that then takes the old one's name, so that there is a whole archive at any time.
keep() {
    cp "$work/summary.csv" "$folder/summary.csv"
    tar -czf "$folder/.new.tgz" -C "$work" . && mv "$folder/.new.tgz" "$folder/results.tgz"
}

record() { # NAME STATUS SECONDS
    echo "$1,$2,$3" >>"$work/summary.csv"
    echo "== $1: $2, $3 s ($SECONDS s of $deadline)"
}

step() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2 began=$SECONDS left status word
    shift 2
    if [ -n "${LIST-}" ]; then
        echo "$name $limit"
        return
    fi
    limit=$((limit * PACE))
    left=$((deadline - SECONDS - GRACE))
    if [ "$left" -lt "$FEWEST" ]; then
        skipped+=("$name")
        record "$name" "skipped: out of time" 0
        keep
        return
    fi
    current=$name
    timeout --signal=INT --kill-after="$GRACE" $((limit < left ? limit : left)) "$@" \
        >"$work/$name.log" 2>&1 </dev/null &
    running=$!
    { wait "$running"; } 2>/dev/null # bash's own line about a job that was killed
    status=$?
    end_group
    case $status in
    0) word=ok ;;
    124) word="out of time" ;;
    137) word=killed ;;
    *) word="failed with $status" ;;
    esac
    record "$name" "$word" $((SECONDS - began))
    if [ "$status" -ne 0 ]; then
        failed+=("$name")
        tail -n 12 "$work/$name.log" | cut -c1-$WIDTH | sed 's/^/   | /'
    fi
    keep
}

# Workers that outlived their step would hold the device's memory.
end_group() {
    kill -KILL -- "-$running" 2>/dev/null
    running=''
}

# The signal may come with little time before a SIGKILL: what is there is kept before anything else.
cut_off() {
    trap '' TERM INT HUP
    if [ -n "$running" ]; then
        record "$current" "cut off" "?"
        keep
        kill -INT "$running" 2>/dev/null
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            kill -0 "$running" 2>/dev/null || break
            sleep 0.2
        done
        end_group
    fi
    keep
    echo "cut off after $SECONDS s; what was done is in $folder/results.tgz"
    exit 143
}

show() { # NAME LINES PATTERN
    [ -z "${LIST-}" ] && [ -f "$work/$1.log" ] || return 0
    grep -E -- "$3" "$work/$1.log" | head -n "$2" | cut -c1-$WIDTH
}

finish() {
    [ -n "${LIST-}" ] && return
    keep
    echo "$SECONDS s; failed: ${failed[*]:-none}; skipped: ${skipped[*]:-none}; $folder/results.tgz"
    [ ${#failed[@]} -eq 0 ] && [ ${#skipped[@]} -eq 0 ]
}
