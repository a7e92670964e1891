#!/usr/bin/env bash
# The whole chain on 2 ranks that share every matrix: tokenizer, SFT, DPO, reward model, RTO, evaluation.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/quickstart
runs=runs/quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

stage() {
    local name=$1 start=$SECONDS
    printf '\n== %s\n' "$name"
    torchrun --standalone --nproc-per-node 2 -m rto_megatron "$name" "$here/$name.yaml"
    printf '== %s took %d seconds\n' "$name" $((SECONDS - start))
}

mkdir -p "$runs"
python tools/train_tokenizer.py --out "$runs/tokenizer.model" --vocab-size 2048 \
    --data "$here/data/sft_train.jsonl" "$here/data/preferences_train.jsonl"
for name in sft dpo reward rto evaluate; do
    stage "$name"
done

cat <<EOF

run folder:   $runs  (table: $runs/evaluation/evaluation.md, answers: $runs/evaluation/responses.jsonl)
TensorBoard:  tensorboard --logdir $runs
one rank:     python -m rto_megatron rto $here/rto.yaml --run_dir=$runs/rto-alone --parallel.tensor=1
EOF
