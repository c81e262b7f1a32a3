#!/usr/bin/env bash
# Trains on several machines under SLURM, and goes on by itself after each time limit or preemption.
#
#     sbatch --nodes 2 --gpus-per-node 8 tools/slurm/train.sh --config-file NAME OUTPUT_DIR /shared/run [KEY VALUE ...]
#
# Submit it from the root of a checkout that all machines can read; OUTPUT_DIR must be on a disk that all of them share.
# The words after the script's name go to train_net.py; --resume, --num-gpus and the three options for several machines
# are added here. Lines that start with #SBATCH are defaults: options of sbatch win, and a cluster may need others
# (--partition, --account). One launcher runs on every machine and starts one process for each of its GPUs.
#
# SLURM sends SIGUSR1 180 s before the time limit. The training then finishes its step, saves, and leaves with exit code
# 75, at which this script puts the job back into the queue; with --resume it goes on where it was. scancel ends it for
# good. Any other exit code is that of the job.
#
# What can be set in the environment before sbatch:
#
#     PYTHON                  the interpreter with fcclip installed                                  (python)
#     FCCLIP_ROOT             the checkout, when the job is not submitted from its root
#     FCCLIP_PROCESSES        processes on each machine                                              (its GPUs, or 1)
#     MASTER_PORT             a free port of the first machine                                       (from the job's id)
#     DETECTRON2_DATASETS     the folder of the data sets                                            (datasets)
#     FCCLIP_TIMEOUT_SECONDS  a process that keeps the others waiting for longer ends the job        (1800)
#     FCCLIP_GRACE_SECONDS    for saving after the signal; less than the 180 s of --signal           (150)
#     OMP_NUM_THREADS         threads of each process                                                (cores / processes)
#     NCCL_SOCKET_IFNAME,     the network interface between the machines, if the first one
#     GLOO_SOCKET_IFNAME      found is not the right one
#     NCCL_DEBUG=INFO         what NCCL finds

#SBATCH --job-name=fcclip
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append

set -uo pipefail

fail() {
    echo "train.sh: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "no SLURM job: submit this script with sbatch"
[ $# -gt 0 ] || fail "nothing to train: sbatch ... tools/slurm/train.sh --config-file NAME [KEY VALUE ...]"
root=${FCCLIP_ROOT:-${SLURM_SUBMIT_DIR:-.}}
[ -f "$root/train_net.py" ] || fail "no train_net.py in $root: submit from the root of the checkout, or set FCCLIP_ROOT"
cd "$root" || exit 2

export PYTHON=${PYTHON:-python}
export FCCLIP_GRACE_SECONDS=${FCCLIP_GRACE_SECONDS:-150}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # newer versions of srun do not take it over from sbatch

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$first" ] || fail "scontrol does not name the machines of '$SLURM_JOB_NODELIST'"
export FCCLIP_DIST_URL="tcp://$first:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
unset MASTER_PORT # with it, a program might take itself for one that torchrun has started
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES machine(s), $FCCLIP_DIST_URL"

# A launcher that is done must not end one whose process is still saving. After one has failed, a process that hangs on
# another machine is ended as late as one that keeps the others waiting.
wait_s=${FCCLIP_TIMEOUT_SECONDS:-1800}
wait_s=${wait_s%.*}
# shellcheck disable=SC2016  # the words in quotes are for the shell on each machine
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait="$wait_s" bash -c '
    exec "$PYTHON" train_net.py --resume \
        --num-gpus "${FCCLIP_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" \
        --num-machines "$SLURM_JOB_NUM_NODES" --machine-rank "$SLURM_NODEID" --dist-url "$FCCLIP_DIST_URL" \
        "$@"' train "$@"
code=$?

# 75: stopped on request after saving. 138: SIGUSR1 came before the training had begun, so nothing was to be saved.
if [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; then
    echo "train.sh: stopped on request; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || {
        echo "train.sh: it could not be requeued; submit it again with the same words, it goes on where it was" >&2
        exit "$code"
    }
    exit 0
fi
exit "$code"
