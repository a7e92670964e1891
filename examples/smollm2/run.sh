#!/usr/bin/env bash
# SmolLM2-135M-Instruct on 2 ranks: get it, convert, DPO, reward model, RTO, evaluation, and back to Hugging Face.
# Stages that are finished are skipped; to do one again, remove its folder under runs/smollm2.
#   bash examples/smollm2/run.sh [HUGGING_FACE_FOLDER]     a local copy of the model (or of another Llama)
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/smollm2
runs=runs/smollm2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if ! (cd / && python -c 'import rto_megatron, torch') 2> /dev/null; then
    make venv
    PATH="$PWD/.venv/bin:$PATH"
fi
if ! python -c 'import accelerate, gguf' 2> /dev/null; then
    echo "installing what reads the model's file (the demo extra)"
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
fi

# timed NAME RESULT COMMAND...: runs the command unless its result is there
timed() {
    local name=$1 result=$2 start=$SECONDS
    shift 2
    if [ -n "$result" ] && [ -e "$result" ]; then
        printf '\n== %s: done before (%s)\n' "$name" "$result"
        return
    fi
    printf '\n== %s\n' "$name"
    "$@"
    printf '== %s took %d seconds\n' "$name" $((SECONDS - start))
}

ranks() { torchrun --standalone --nproc-per-node 2 -m rto_megatron "$@"; }

timed get "$runs/hf/config.json" python tools/get_smollm2.py --out "$runs/hf" ${1:+--source "$1"}
timed convert "$runs/base/checkpoints/latest.txt" ranks convert --source "$runs/hf" --out "$runs/base"
for name in dpo reward rto; do
    # no result to look for: a stage knows itself whether it is done, or where it stopped
    timed "$name" "" ranks "$name" "$here/$name.yaml"
done
timed evaluate "$runs/evaluation/evaluation.md" ranks evaluate "$here/evaluate.yaml"
timed export "$runs/rto-hf/config.json" ranks convert --source "$runs/rto" --out "$runs/rto-hf"

cat "$runs/evaluation/evaluation.md"
cat <<TEXT

run folder:    $runs  (answers: $runs/evaluation/responses.jsonl)
TensorBoard:   tensorboard --logdir $runs
for others:    $runs/rto-hf is a Hugging Face folder
all of it took $SECONDS seconds
TEXT
