#!/usr/bin/env bash
# Trains under Slurm, on one machine or several; ends before the time limit, is queued again, and resumes.
#
#   sbatch scripts/slurm.sh configs/scenes.yaml                               as set below: one machine
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh CONFIG name=big       two machines with 8 GPUs each
#   PROCESSES=4 sbatch scripts/slurm.sh CONFIG                                4 processes on each machine, such as on CPUs
#
# Submit it from the project's folder. Set up the environment before, on the login node: `bash scripts/train_mtl.sh --help`.
# The run directory must be on a disk that all machines see.
#SBATCH --job-name=mtl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the limit, this script (B) gets SIGTERM, and hands it on; a step and a checkpoint fit into that.
#SBATCH --signal=B:TERM@120
set -euo pipefail

# Slurm runs a copy of this file in a folder of its own; the project is where sbatch was called.
PROJECT="${MTL_PROJECT:-$SLURM_SUBMIT_DIR}"
PYTHON="${PYTHON:-$PROJECT/.venv/bin/python}"
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}"
cd "$SLURM_SUBMIT_DIR"

# One process a GPU; without GPUs one a machine.
processes="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"
processes=$((processes > 0 ? processes : 1))
threads=$((${SLURM_CPUS_PER_TASK:-$processes} / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# torchrun shares its own store with the processes, and keeps what they wrote in it over a restart; mtl can live with
# that, other code that it starts may not.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The machines meet at the first of them, at a port that is this job's own.
machines="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
# Not by `head`, which closes the pipe: with pipefail that would end this script, if scontrol is still writing.
first="${machines%%$'\n'*}"
port=$((20000 + SLURM_JOB_ID % 20000))

signals=0
job=
hand_on() {
    signals=$((signals + 1))
    # srun hands it on to the torchrun of every machine, and that to its processes, which it gives 30 s. A second one
    # would end them at once.
    if [ "$signals" = 1 ] && [ -n "$job" ]; then kill -TERM "$job" || true; fi
}
# Before anything is started: without it, a signal would end this script, and nobody would queue the job again.
trap hand_on TERM

# One torchrun on each machine. MAX_RESTARTS=3 has it start its processes again if one of them fails; a run that its audit
# ended does not resume. If a machine fails, Slurm queues the job again.
srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --max-restarts="${MAX_RESTARTS:-0}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \
    -m mtl train "$@" resume=auto &
job=$!
if [ "$signals" != 0 ]; then kill -TERM "$job" || true; fi

# A signal breaks a wait off; then it is waited again, for the processes to save and end.
seen=-1
while [ "$seen" != "$signals" ]; do
    seen=$signals
    code=0
    wait "$job" || code=$?
done
if [ "$signals" != 0 ] && [ "$code" != 0 ]; then
    echo "The time is up: the job is queued again, and resumes."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
