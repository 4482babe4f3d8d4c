# shellcheck shell=bash
# Shared by the scripts of this folder, which source it with PART set and then use $python,
# "${words[@]}" and $logs. Not to be submitted itself.

usage() { sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$1"; }

case " $* " in *" --help "* | *" -h "*)
    usage "$0"
    exit 0
    ;;
esac
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "$0 is a job script: submit it with sbatch, as its help says" >&2
    usage "$0" >&2
    exit 2
fi

# SLURM runs a copy of the script, so change to the folder where sbatch was called.
cd "$SLURM_SUBMIT_DIR" || exit
python=${EMOVERSE_PYTHON:-python3}
if [ -z "${EMOVERSE_PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=$PWD/.venv/bin/python; fi

# Arguments: KEY=VALUE overrides and config files, in any order; without a file the default one.
words=("$@")
config=
for word in "$@"; do
    case $word in
    -*) ;;
    *=*) case ${word%%=*} in */*) config=$word ;; esac ;; # a path such as runs/lr=1e-4/config.yaml
    *) config=$word ;;
    esac
done
if [ -z "$config" ] && [ "$PART" != build ]; then words=(configs/emoverse_4b.yaml "$@"); fi

# A crash of Python prints its stack; the worker sets the number of threads from --cpus-per-task.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# NCCL: only the log level is set here, unless you have set it. Variables that a cluster may
# require, to be set in the shell that calls sbatch (docs/cluster.md says how to find the values):
#   NCCL_SOCKET_IFNAME  network device of the first meeting, e.g. ib0, or ^docker0,lo
#   NCCL_IB_HCA         InfiniBand adapters, e.g. mlx5_0,mlx5_1
#   GLOO_SOCKET_IFNAME  the same as the first, for runs on CPU
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

echo "$(date -Is) job $SLURM_JOB_ID ($SLURM_JOB_NAME), start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
logs=
if [ "$PART" != build ]; then
    # Reads the config, so a mistake in it ends the job here, before any rank starts.
    logs=$("$python" -m launch.slurm.job_log "$PART" "${words[@]}")
    echo "log: $logs/rank_0.log and one per further rank; status: emoverse status ${logs%/"$PART"/logs/*}"
fi
