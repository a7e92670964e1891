#!/usr/bin/env bash
# What srun starts once on every node, for stage.sbatch: the launcher, which starts the node's ranks.
#   node.sh NAME RANKS MASTER PORT LOGS -m rto_megatron STAGE ...
set -euo pipefail
name=$1 ranks=$2 master=$3 port=$4 logs=$5
shift 5

if [ -n "${PLAN:-}" ]; then
    node=THIS_NODE id=NODE_NUMBER is_host=1_ON_THE_FIRST_NODE_ELSE_0 job=JOB_ID nodes=${NODES:-1}
else
    node=$(hostname) id=$SLURM_NODEID job=$SLURM_JOB_ID nodes=$SLURM_NNODES
    is_host=$((id == 0))
fi
# Many clusters let a process open 1024 files, and keep core dumps.
ulimit -n "$(ulimit -Hn)" 2> /dev/null || true
ulimit -c 0
command=("${PYTHON:-python}" -m rto_megatron.launch --nnodes="$nodes" --nproc-per-node="$ranks"
    # the first node holds the meeting point whatever it takes its own name for: /etc/hosts may call it 127.0.1.1
    --rdzv-backend=c10d --rdzv-endpoint="$master:$port" --rdzv-id="$job-$name"
    --rdzv-conf="is_host=$is_host,join_timeout=300" --local-addr="$node"
    --log-dir="$logs/$name-$node" --redirects=3 --tee=3 "$@")
if [ -n "${PLAN:-}" ]; then
    printf '           '
    printf ' %q' "${command[@]}"
    printf '\n'
else
    exec "${command[@]}"
fi
