#!/bin/bash
# A job under Slurm, on a cluster whose nodes share the checkout (or the environment) and the runs:
#
#   sbatch params/machines/slurm.sh run PARAMS.yaml --only 04             one notebook or several
#   sbatch --array=0-7 params/machines/slurm.sh extract PARAMS.yaml       notebook 05, eight workers
#   sbatch --nodes=2 --ntasks-per-node=4 params/machines/slurm.sh train PARAMS.yaml --only 02
#
# Further arguments go to `vitgal run` and `python -m vitgal.training`. Set the partition, account
# and time limit on the command line or here. VITGAL_DRY_RUN=1 prints the command alone.
#SBATCH --job-name=vitgal
#SBATCH --output=vitgal-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -u
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
task=$1 params=$2
shift 2
settings=(-p machine slurm)
case $task in
run) command=(vitgal run "$params" "${settings[@]}" "$@") ;;
extract)
    workers=(-p worker "${SLURM_ARRAY_TASK_ID:?start it with sbatch --array=0-7}")
    workers+=(-p worker_count "$SLURM_ARRAY_TASK_COUNT")
    command=(vitgal run "$params" --only 05 "${settings[@]}" "${workers[@]}" "$@")
    ;;
train)
    # One task a GPU. The variables are torch's, of which a task knows its own number alone.
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR
    # Each task sees its own GPU alone, which is number 0.
    command=(sh -c 'RANK=$SLURM_PROCID LOCAL_RANK=0 exec "$@"' -)
    command+=(python -m vitgal.training "$params" "${settings[@]}")
    command+=(-p num_processes "$SLURM_NTASKS" "$@")
    ;;
*)
    echo "slurm.sh: $task is none of run, extract, train" >&2
    exit 2
    ;;
esac
[ -z "${VITGAL_DRY_RUN:-}" ] || { printf '%q ' srun "${command[@]}"; echo; exit 0; }
# The signal before the time limit reaches the steps; they save their state and end with 75.
srun --kill-on-bad-exit=1 "${command[@]}"
status=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
[ "$status" -ne 75 ] || scontrol requeue "${job:-$SLURM_JOB_ID}"
exit "$status"
