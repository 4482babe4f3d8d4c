#!/bin/bash
# Trains stage 1 on all ranks of the job, or resumes it.
#
#   sbatch [FLAGS] slurm/stage1.sh [CONFIG.yaml ...] [KEY=VALUE ...]
#
# CONFIG     default configs/emoverse_4b.yaml; several files are merged, later ones win
# KEY=VALUE  overrides of the config, such as run.run_dir=/shared/runs/a
# FLAGS      sbatch's own; they win over the lines below: --nodes=4, --time=2-0, --account=NAME, ...
#
# One rank per GPU. Before the time limit and on pre-emption the ranks save and the job requeues
# itself; a lost node does the same. After a wrong config or a crash the job ends; a restart would not help.
# Next: sbatch --dependency=afterok:JOB --kill-on-invalid-dep=yes slurm/stage2.sh with the same words.
# Submit from the top of the repository. EMOVERSE_PYTHON names the interpreter (default:
# .venv/bin/python, else python3); EMOVERSE_MAX_REQUEUES how often the job may begin again (20).
#SBATCH --job-name=emoverse-stage1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
PART="stage1"
# shellcheck source=slurm/job.sh
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/job.sh"

# exec: a signal for the batch shell alone reaches srun, which passes it on to every rank.
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --open-mode=append \
    --output="$logs/rank_%t.log" "$python" -m launch.worker "${words[@]}" --stage=stage1 \
    --max-requeues="${EMOVERSE_MAX_REQUEUES:-20}"
