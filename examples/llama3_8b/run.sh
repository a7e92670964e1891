#!/usr/bin/env bash
# Llama-3-8B by the paper's recipe on SLURM: data, conversion, DPO, reward model, RTO, evaluation, and back to Hugging Face.
#   bash examples/llama3_8b/run.sh one_node|eight_nodes [--plan] [--from STAGE] [--until STAGE] [-- SBATCH_WORDS...]
#     --plan     prints every command that would be run, and runs none; needs no SLURM
#     --from     begins with this stage: data, sft_model, dpo, small_model, reward, rto, evaluate, export
# Each stage is a job that waits for the ones before it (afterok). What a stage needs is asked of the environment:
#     SFT_MODEL    Hugging Face folder of OpenRLHF/Llama-3-8b-sft-mixture
#     SMALL_MODEL  Hugging Face folder of meta-llama/Llama-3.2-1B-Instruct, which the reward model and the critic start from
#     PYTHON       of the environment, the same path on all nodes
#     SRUN_WORDS   more words for srun, such as --container-image=...; RETRIES: starts after a broken one (1)
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/llama3_8b
stages=(data sft_model dpo small_model reward rto evaluate export)

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$here/run.sh" >&2
    exit 2
}

size=${1:-}
case $size in
    one_node) nodes=1 ;;
    eight_nodes) nodes=8 ;;
    *) usage ;;
esac
shift
plan=
from=${stages[0]}
until=${stages[-1]}
while [ $# -gt 0 ]; do
    case $1 in
        --plan) plan=yes ;;
        --from) from=${2:?--from needs a stage}; shift ;;
        --until) until=${2:?--until needs a stage}; shift ;;
        --) shift; break ;;
        *) usage ;;
    esac
    shift
done
for name in "$from" "$until"; do
    [[ " ${stages[*]} " == *" $name "* ]] || usage
done
export PYTHON=${PYTHON:-python} RETRIES=${RETRIES:-1}
if [ -n "$plan" ]; then
    SFT_MODEL=${SFT_MODEL:-SFT_MODEL}
    SMALL_MODEL=${SMALL_MODEL:-SMALL_MODEL}
else
    : "${SFT_MODEL:?set it to the folder of OpenRLHF/Llama-3-8b-sft-mixture}"
    : "${SMALL_MODEL:?set it to the folder of meta-llama/Llama-3.2-1B-Instruct}"
fi
runs=runs/llama3_8b/$size

declare -A job    # stage -> number of its job
say() { printf ' %q' "$@"; printf '\n'; }

# submit NAME WAITS_FOR NODES RANKS STAGE YAML WORDS...: WAITS_FOR is a list of stages; those of an earlier call are done
submit() {
    local name=$1 waits=$2 on=$3 ranks=$4 after=() before
    shift 4
    for before in $waits; do
        if [ -n "${job[$before]:-}" ]; then after+=("${job[$before]}"); fi
    done
    local words=(sbatch --parsable --job-name="rto-$size-$name" --nodes="$on" --gpus-per-node="$ranks"
        --output="$runs/logs/%j-$name.out" --export="ALL,RANKS=$ranks,LOGS=$runs/logs")
    if [ ${#after[@]} -gt 0 ]; then
        words+=("--dependency=afterok:$(IFS=:; echo "${after[*]}")" --kill-on-invalid-dep=yes)
    fi
    words+=(${sbatch_words[@]+"${sbatch_words[@]}"} "$here/stage.sbatch" "$@")
    if [ -n "$plan" ]; then
        job[$name]="\$$name"
        printf '\n%s=' "$name"
        say "${words[@]}" | sed 's/\\\$/$/g'
        PLAN=yes NODES=$on RANKS=$ranks LOGS=$runs/logs bash "$here/stage.sbatch" "$@"
        return
    fi
    job[$name]=$("${words[@]}")
    job[$name]=${job[$name]%%;*}    # NUMBER;CLUSTER where there are several
    echo "$name: job ${job[$name]}, log $runs/logs/${job[$name]}-$name.out"
}

sbatch_words=("$@")
on=
for name in "${stages[@]}"; do
    if [ "$name" = "$from" ]; then on=yes; fi
    if [ -z "$on" ]; then continue; fi
    case $name in
        data)    # here, on the login node: it reaches the hub
            prepare=("$PYTHON" "$here/prepare.py" --out runs/llama3_8b/data)
            if [ -n "$plan" ]; then say "${prepare[@]}"; else "${prepare[@]}"; mkdir -p "$runs/logs"; fi ;;
        sft_model) submit sft_model "" 1 8 convert --source="$SFT_MODEL" --out="$runs/sft" --parallel.tensor=2 ;;
        dpo) submit dpo sft_model "$nodes" 8 dpo "$here/$size/dpo.yaml" ;;
        small_model) submit small_model sft_model 1 1 convert --source="$SMALL_MODEL" --out="$runs/small" --tokenizer="$runs/sft" ;;
        reward) submit reward small_model "$nodes" 8 reward "$here/$size/reward.yaml" ;;
        rto) submit rto "dpo reward" "$nodes" 8 rto "$here/$size/rto.yaml" ;;
        evaluate) submit evaluate rto 1 8 evaluate "$here/$size/evaluate.yaml" ;;
        export) submit export rto 1 8 convert --source="$runs/rto" --out="$runs/rto-hf" --parallel.tensor=2 ;;
    esac
    if [ "$name" = "$until" ]; then break; fi
done
