#!/bin/sh
#SBATCH --job-name=replknet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=7-00:00:00
# Trains on several machines under SLURM. One task on each machine starts Paddle's launcher, which starts a process per
# GPU. All arguments are passed to main_multi_gpu.py. Submit it from this folder, which all machines must share:
#   sbatch run_train_slurm.sh -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -amp -accum_iter=2
# To find settings that fit the cluster: python main_multi_gpu.py -cfg=... -dry_run -nodes 2 -gpus_per_node 8
set -e
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")" && pwd)}  # sbatch runs a copy of this file
. "$root/setup_env.sh"

# This script runs on the first machine. The launcher compares its own address with the master's, so a host name would
# not match.
address=$("$PYTHON" -c 'import socket; print(socket.gethostbyname(socket.getfqdn()))')
case $address in
    127.*) echo "run_train_slurm.sh: $(hostname) resolves its own name to $address, which other machines cannot reach:" \
                "give it its own address in /etc/hosts" >&2 ;;
esac
export PYTHON root MASTER="$address:$((20000 + SLURM_JOB_ID % 10000))"
exec srun sh -c 'exec "$PYTHON" -m paddle.distributed.launch --nnodes "$SLURM_NNODES" --rank "$SLURM_NODEID" \
    --master "$MASTER" --log_dir "log/$SLURM_JOB_ID/$SLURM_NODEID" "$root/main_multi_gpu.py" "$@"' sh "$@"
