#!/bin/bash
# train.py on several nodes of a Slurm cluster. All arguments go to train.py; type it at the top of the repository:
#   sbatch --nodes 2 launch/slurm.sh --model mgm-2b --dataset my.json --output_dir outputs/mine
# Another launch config (accelerate_configs/): sbatch --export ALL,CONFIG=zero3 ...
# First, the same with --doctor: do the nodes reach each other, and are they alike?
#SBATCH --job-name train
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1        # one launcher a node; it starts a process for each GPU
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --exclusive
#SBATCH --output %x-%j.log
#SBATCH --signal TERM@120          # two minutes before the time limit: the run saves its last update and ends
set -euo pipefail

if [[ -d .venv ]]; then . .venv/bin/activate; fi
gpus=${SLURM_GPUS_ON_NODE:-1}
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-$gpus} / gpus))
launch="accelerate launch --config_file accelerate_configs/${CONFIG:-ddp}.yaml --num_machines $SLURM_NNODES"
launch+=" --num_processes $((SLURM_NNODES * gpus)) --main_process_ip $main"
launch+=" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) --rdzv_conf timeout=120"
if [[ ${CONFIG:-ddp} == zero* ]]; then # not pdsh, DeepSpeed's default: srun starts a launcher on each node
    launch+=" --deepspeed_multinode_launcher standard"
fi
# The shell on each node reads its own SLURM_NODEID. If one node fails, Slurm ends all.
srun --kill-on-bad-exit=1 bash -c 'exec $0 --machine_rank "$SLURM_NODEID" train.py "$@"' "$launch" "$@"
