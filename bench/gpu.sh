#!/usr/bin/env bash
# The two short runs on a GPU. bench/device/README.md says what they answer.
#
#     bash bench/gpu.sh 1 FOLDER             right, and how fast: 300 s
#     bash bench/gpu.sh 2 FOLDER             tuning, peers, the driver: 400 s
#     bash bench/gpu.sh 1 FOLDER --dry       every command, as small as it gets, without a GPU
#     bash bench/gpu.sh 1 FOLDER --list      the steps and their limits in seconds
#
# FOLDER gets results.tgz and summary.csv; the tables are in the output. Nothing of the project has
# to be installed. PYTHON says which python.
set -uo pipefail
usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
}
[[ ${1-} == [12] && -n ${2-} ]] || usage
run=$1 output=$2 DRY='' LIST=''
case ${3-} in
'') ;;
--dry) DRY=1 ;;
--list) LIST=1 ;;
*) usage ;;
esac
mkdir -p "$output" && output=$(cd "$output" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
device=bench/device

# pick FULL SMALL: the words of one of them, as arguments of a step
pick() { if [ -n "$DRY" ]; then echo "$2"; else echo "$1"; fi; }

[ -n "$DRY" ] && PACE=3 # two cores, and kernels in the interpreter
. $device/steps.sh
. $device/run$run.sh
finish
