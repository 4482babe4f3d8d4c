#!/bin/bash
# Builds a shard folder from a corpus, on one CPU node.
#
#   sbatch [FLAGS] slurm/build_shards.sh CORPUS --out=DIR [OPTIONS]
#
# The arguments are those of `emoverse build`; `emoverse build --help` lists corpora and options. A job
# that begins again, or is submitted again, continues after what is built.
# FLAGS are sbatch's own and win over the lines below: --cpus-per-task=16, --time=1-0, ...
#
# Submit from the top of the repository. EMOVERSE_PYTHON names the interpreter (default:
# .venv/bin/python, else python3). Next: emoverse lint DIR, emoverse plan CONFIG data.shards=DIR
#SBATCH --job-name=emoverse-build
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
PART="build"
# shellcheck source=slurm/job.sh
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/job.sh"

exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "$python" -m launch.cli build "${words[@]}"
