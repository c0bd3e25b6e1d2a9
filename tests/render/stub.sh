#!/bin/bash
# Stands in for srun, mpirun, apptainer, squeue and python: writes down how it was called, then does
# what the file of that program in $STUBS says: `exit N`, `terms K N` (ends at the Kth TERM or USR1), `deaf`,
# `finds K N` (rank 0's preflight says K; then it ends, or hangs until TERM if N is `hangs`), `after K N` (ends once K agents are up), `joins K N` (K ranks write their files, then it ends, or hangs if N is `hangs`), `say TEXT`, `run PROGRAM DIRECTORY` (as a step with PMIx).
name=${0##*/}
program=$name
for word in "$@"; do
  if [ "$program" = close ]; then break; fi
  case $word in
    rendezvous | preflight | stage | agent | head | close) program=$word ;;
    mpi | tcp | file) if [ "$program" = rendezvous ]; then program=rendezvous-$word; fi ;;
    --mpi=list) program=mpi-list ;;
  esac
done
printf '%s\n' "$(printf '%q ' "$name" "$program" "rank=${HPCSERVE_RANK:-}" "binds=${APPTAINER_BIND:-}" "$@")" >>"$STUBS/calls"
echo "$$ $program" >>"$STUBS/pids"
action=exit first=0
if [ -e "$STUBS/$program" ]; then read -r action first second <"$STUBS/$program"; fi
case $action in
  exit) exit "$first" ;;
  joins)
    mkdir -p "$HPCSERVE_RUN_DIR/ranks"
    for ((rank = 0; rank < first; rank++)); do echo '{}' >"$HPCSERVE_RUN_DIR/ranks/$rank.json"; done
    if [ "$second" = hangs ]; then sleep 3600 & wait "$!"; fi
    exit "$second"
    ;;
  finds)
    mkdir -p "$HPCSERVE_RUN_DIR/rendezvous"
    echo "local.0 $first" >"$HPCSERVE_RUN_DIR/rendezvous/preflight-over"
    if [ "$second" = hangs ]; then
      echo "$program" >>"$STUBS/up"
      trap 'exit 137' TERM
      while :; do sleep 0.05 & wait "$!"; done
    fi
    exit "$second"
    ;;
  say) echo "$first"; exit 0 ;;
  terms)
    left=$first
    trap 'left=$((left - 1)); echo "$program TERM" >>"$STUBS/signals"' TERM
    trap 'left=$((left - 1)); echo "$program USR1" >>"$STUBS/signals"' USR1
    echo "$program" >>"$STUBS/up"
    while [ "$left" -gt 0 ]; do sleep 0.05 & wait "$!"; done
    exit "$second"
    ;;
  after) # K agents are up
    until [ "$(grep -c '^agent' "$STUBS/up" 2>/dev/null)" = "$first" ]; do sleep 0.05; done
    exit "$second"
    ;;
  deaf)
    trap 'echo "$program TERM" >>"$STUBS/signals"' TERM
    trap 'echo "$program USR1" >>"$STUBS/signals"' USR1
    echo "$program" >>"$STUBS/up"
    while :; do sleep 0.05 & wait "$!"; done
    ;;
  run) # from the first word that is a program of ours
    while [ "$#" -gt 0 ] && [ "$1" != "$first" ]; do shift; done
    export PMIX_SERVER_TMPDIR=$second
    exec "$@"
    ;;
esac
