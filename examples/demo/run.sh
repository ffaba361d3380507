#!/bin/sh
# The demo: the very commands that a user would type, each printed before it runs.
# Usage: run.sh path/to/apportion path/to/python; from the repository's root.
set -eu
apportion=$1
python=$2

say() {
    printf '$ apportion'
    printf ' %s' "$@"
    printf '\n'
}

type_and_run() {
    say "$@"
    "$apportion" "$@"
}

mkdir -p demo
again=no
[ -e demo/winner ] && again=yes
type_and_run --home demo check examples/demo/study.toml
type_and_run --home demo submit examples/demo/study.toml
type_and_run --home demo show demo --plot demo/front.png
[ "$again" = yes ] || type_and_run --home demo export demo --to demo/winner
type_and_run verify demo/winner
"$apportion" --home demo show demo --json >demo/show.json
"$apportion" verify demo/winner --json >demo/verify.json
"$python" -P examples/demo/summary.py demo
if [ "$again" = yes ]; then
    echo "This was the stored result; to start afresh: make clean-demo demo"
fi
