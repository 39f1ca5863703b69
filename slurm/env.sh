# The only file that a site edits. submit.sh and prefetch.sh read it on the login node, and every job on each of its nodes, so it
# may run several times; it sets things and does nothing else.
#
# shellcheck shell=bash disable=SC2034  # common.sh and the scripts beside it use what is set here

# ---- the queue: what sbatch asks for. #SBATCH lines cannot read a file, these variables can; options on a command line win -------
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=a100
ACCOUNT_REQUIRED="${ACCOUNT_REQUIRED:-no}" # yes: submit.sh stops where SBATCH_ACCOUNT is not set

# How this site is asked for GPUs, when submit.sh is given --gpus-per-node; sites that want a type, or know only --gres, change it:
#   echo "--gpus-per-node=a100:$1"      echo "--gres=gpu:$1"      echo "--gres=gpu:a100:$1"
# Without --gpus-per-node sbatch takes SBATCH_GPUS_PER_NODE or SBATCH_GRES from here, if one is set.
gpu_request() { echo "--gpus-per-node=$1"; }
CPUS_PER_GPU="${CPUS_PER_GPU:-4}" # asked for with each GPU; empty leaves it to the site

# ---- caches: on the shared disk, for home folders are small; compute nodes find there what prefetch.sh has fetched ---------------
SHARED_CACHE="${SHARED_CACHE:-${SCRATCH:-$PWD/build}/cache}"
export HF_HOME="${HF_HOME:-$SHARED_CACHE/huggingface}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$SHARED_CACHE/torch_extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/triton-$(id -u)}" # many small files, locked: node-local

# ---- Python --------------------------------------------------------------------------------------------------------------------
# module purge; module load gcc cuda python/3.12
PYTHON_ENVIRONMENT="${PYTHON_ENVIRONMENT-.venv}" # a venv's or conda environment's folder; empty: the python that is on PATH
# One tar file is read faster than the thousands of small files of an environment on a shared disk: `bash slurm/prefetch.sh RECIPE --pack
# FILE` makes it, and each node unpacks it once into $SLURM_TMPDIR or $TMPDIR. Without either the folder above is used.
PACKED_ENVIRONMENT="${PACKED_ENVIRONMENT:-}"
# In a container, made from qlora-suite.def:
# PYTHON_ENVIRONMENT="" PYTHON_COMMAND=(apptainer exec --nv --bind "$PWD,$SHARED_CACHE" "$PWD/qlora-suite.sif" python)

# ---- the network: compute nodes have none to the outside, and nothing shall wait for it ------------------------------------------
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE="${WANDB_MODE:-offline}"
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the interface between the nodes, where NCCL picks a wrong one
# HEAD_ADDRESS=10.0.0.1                                  # for one job, where the head node's name leads nowhere: see train.sbatch
