#!/bin/bash
#SBATCH --account=proj
#SBATCH --exclusive
#SBATCH --gres=gpu:8
#SBATCH --job-name=llama-3.1-8b-instruct
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=/scratch/alice/hpcserve/llama-3.1-8b-instruct/logs/job.log
#SBATCH --signal=B:TERM@180
#SBATCH --time=04:00:00

# llama-3.1-8b-instruct: 1 node, 4 prefill (TP1) + 4 decode (TP1), vllm on cuda.
# Rendered by hpcserve; `hpcserve render` prints it again.

umask 077
export HPCSERVE_RUN_DIR=/scratch/alice/hpcserve/llama-3.1-8b-instruct
logs=$HPCSERVE_RUN_DIR/logs
python= # known after the set-up
inside=()

say() { printf '%s\n' "$*" >&2; }

# Every end of this job leaves one `failed` or `stopped` in events.jsonl. Mostly the head writes it;
# what ends before, or without a word, is told here.
stage=setup
signals=0
ends() { cat -- "$HPCSERVE_RUN_DIR/events.jsonl" 2>/dev/null | grep -cE '"event": "(failed|stopped)"'; }
ends_before=$(ends)
# shellcheck disable=SC2317,SC2329  # called by the trap
on_exit() {
  local status=$? close
  trap '' TERM INT
  if [ "$(ends)" != "$ends_before" ]; then exit "$status"; fi
  close=(-m hpcserve.node close --run-dir "$HPCSERVE_RUN_DIR" --stage "$stage" --status "$status")
  if [ "$signals" -gt 0 ]; then close+=(--signalled); fi
  if [ -z "$python" ] || ! srun --overlap --nodes=1 --ntasks=1 --mpi=none --cpu-bind=none --gres=none "--container-image=/images/hpcserve.sqsh" "--container-mounts=/tmp:/tmp,/scratch/alice/hpcserve:/scratch/alice/hpcserve,/models/Llama-3.1-8B-Instruct:/models/Llama-3.1-8B-Instruct:ro" --no-container-mount-home --no-container-remap-root --container-env=HPCSERVE_RUN_DIR --nodelist="$SLURMD_NODENAME" "$python" "${close[@]}"; then
    # Perhaps Python itself is what does not work here.
    printf '{"t": %s, "event": "failed", "message": "%s", "hint": "%s", "exit_code": %s}\n' \
      "$(date +%s)" "the job ended with status $status in its stage '$stage'" \
      "logs/job.log says why" "$status" >>"$HPCSERVE_RUN_DIR/events.jsonl"
  fi
  exit "$status"
}
trap on_exit EXIT

# They name this node's libraries and would break those of the image.
unset LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME PYTHONPATH PYTHONSTARTUP VIRTUAL_ENV

export PYTHONNOUSERSITE=1

# What sbatch was told (--export=NONE, --mpi, --cpu-bind) must not reach the steps below.
export SLURM_EXPORT_ENV=ALL
unset SLURM_MPI_TYPE SLURM_CPU_BIND SLURM_KILL_BAD_EXIT

# The head process may run where squeue is missing: inside the container.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  if end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && end=$(date --date="${end%%$'\n'*}" +%s); then
    export SLURM_JOB_END_TIME=$end
  else
    echo "warning: squeue does not say when this job ends; it will not drain before its walltime" >&2
  fi
fi

python=python3
# Asked to stop while it waited to start again: then it must not come back.
if [ -e "$HPCSERVE_RUN_DIR/stop" ]; then
  say "stopped: the file \`stop\` is in the run directory"
  stage=stop-file
  exit 0
fi
# A job that Slurm puts back comes back to the same directory: nobody may take old addresses for new ones.
rm -rf -- "$HPCSERVE_RUN_DIR"/{ranks/*.json,rendezvous,roster.json,head.json,endpoint.json}

stage=rendezvous
kill_wait=30
logs_pattern=${logs//%/%%} # srun replaces %t and the like in names of files
step=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpu-bind=none "--container-image=/images/hpcserve.sqsh" "--container-mounts=/tmp:/tmp,/scratch/alice/hpcserve:/scratch/alice/hpcserve,/models/Llama-3.1-8B-Instruct:/models/Llama-3.1-8B-Instruct:ro" --no-container-mount-home --no-container-remap-root --container-env=HPCSERVE_RUN_DIR)

# Signals: the first TERM drains, the second forces; each is passed on to `running`.
running=()
pass_as=TERM
# shellcheck disable=SC2317,SC2329  # called by the trap
pass_on() {
  signals=$((signals + 1))
  if [ "${#running[@]}" -gt 0 ]; then kill "-$pass_as" "${running[@]}" 2>/dev/null; fi
}
trap pass_on TERM INT

# await PID: its exit status, however many signals arrive meanwhile.
await() {
  local before status
  while :; do
    before=$signals
    wait "$1"
    status=$?
    if [ "$signals" -eq "$before" ]; then return "$status"; fi
  done
}

alive() {
  local pid
  for pid in "$@"; do
    if kill -0 "$pid" 2>/dev/null; then return 0; fi
  done
  return 1
}

# within SECONDS PID…: wait until none is alive; false when the time is over.
within() {
  local deadline=$((SECONDS + $1))
  shift
  while alive "$@"; do
    if [ "$SECONDS" -ge "$deadline" ]; then return 1; fi
    sleep 0.2 &
    wait "$!"
  done
}

# 1. Rendezvous: a short step of its own, so that MPI never lives beside an engine.
rendezvous() { # TRANSPORT, then further flags of srun
  local transport=$1
  shift
  "${step[@]}" "$@" --kill-on-bad-exit=0 --wait=0 --open-mode=append --output="$logs_pattern/rendezvous-%t.log" \
    "${inside[@]}" "$python" -m hpcserve.node rendezvous --run-dir "$HPCSERVE_RUN_DIR" --transport "$transport" &
  running=("$!")
  await "$!"
}

# Each rank writes its file before it waits for the others.
all_came() {
  local ranks=("$HPCSERVE_RUN_DIR"/ranks/*.json)
  [ "${#ranks[@]}" -eq 1 ] && [ -e "${ranks[0]}" ]
}

met=75
for transport in mpi tcp file; do
  flags=(--mpi=none)
  if [ "$transport" = mpi ]; then
    flags=(--mpi=pmix)
    if ! srun --mpi=list 2>&1 | grep -qwF -- pmix; then
      say "warning: this Slurm has no MPI plugin \"pmix\", so the rendezvous goes without MPI"
      say "hint: correct slurm.mpi in the site config; \`srun --mpi=list\` names the plugins"
      continue
    fi
  fi
  rendezvous "$transport" "${flags[@]}"
  met=$?
  running=()
  # All ranks came, and none of them has a verdict (hpcserve's own statuses end at 8): MPI itself died.
  if [ "$transport" = mpi ] && [ "$met" -gt 8 ] && [ "$met" -ne 75 ] && all_came; then
    say "warning: MPI ended with status $met after all ranks had come"
    met=75
  fi
  if [ "$met" -ne 75 ] || [ "$signals" -gt 0 ]; then break; fi
  say "warning: the rendezvous can't use $transport here; see $logs/rendezvous-0.log"
done
if [ "$signals" -gt 0 ]; then
  say "stopped before the rendezvous was over"
  exit 143
fi
if [ "$met" -ne 0 ]; then
  say "error: the rendezvous failed with status $met; see $logs/rendezvous-*.log"
  if [ "$met" -eq 75 ]; then exit 6; fi
  exit "$met"
fi

# 2. Agents: one per node, outliving their engines and each other.
stage=serving
agents=()
"${step[@]}" --no-kill --kill-on-bad-exit=0 --wait=0 --mpi=none \
  --open-mode=append --output="$logs_pattern/agent-%t.log" \
  "${inside[@]}" "$python" -m hpcserve.node agent --run-dir "$HPCSERVE_RUN_DIR" &
agents+=("$!")

# 3. Head: controller and router, on this node. Its exit status is the job's.
pass_as=USR1 # srun answers TERM by killing its tasks, and hands this on
srun --overlap --nodes=1 --ntasks=1 --mpi=none --cpu-bind=none --gres=none "--container-image=/images/hpcserve.sqsh" "--container-mounts=/tmp:/tmp,/scratch/alice/hpcserve:/scratch/alice/hpcserve,/models/Llama-3.1-8B-Instruct:/models/Llama-3.1-8B-Instruct:ro" --no-container-mount-home --no-container-remap-root --container-env=HPCSERVE_RUN_DIR \
  --nodelist="$SLURMD_NODENAME" --open-mode=append --output="$logs_pattern/head.log" \
  "$python" -m hpcserve.node head --run-dir "$HPCSERVE_RUN_DIR" &
head=$!
running=("$head")
if [ "$signals" -gt 0 ]; then kill "-$pass_as" "$head" 2>/dev/null; fi

# The head notices lost agents one by one; when their whole step is gone there is nothing left to serve.
while alive "$head" && alive "${agents[@]}"; do
  sleep 0.5 &
  wait "$!"
done
if alive "$head" && ! within 30 "$head"; then
  say "error: all agents are gone; see $logs/agent-*.log"
  kill "-$pass_as" "$head" 2>/dev/null
fi
await "$head"
status=$?
if [ "$status" -ne 0 ]; then say "error: the head process ended with status $status; see $logs/head.log"; fi

# 4. Nothing is left running: agents have KillWait to end their engines.
running=("${agents[@]}")
if alive "${agents[@]}"; then
  kill "-$pass_as" "${agents[@]}" 2>/dev/null
  if ! within "$kill_wait" "${agents[@]}"; then
    say "warning: agents did not end within $kill_wait s and are killed"
    kill -KILL "${agents[@]}" 2>/dev/null
  fi
fi
wait
exit "$status"
