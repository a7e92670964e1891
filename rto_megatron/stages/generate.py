"""Responses of a checkpoint to a file of prompts, as JSON lines."""

from rto_megatron.config.run import GenerateRun
from rto_megatron.data.collate import prompt_batch
from rto_megatron.data.readers import PromptRow, read_prompts
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.rows import gather_rows, share_of
from rto_megatron.distributed.runtime import Runtime, is_main
from rto_megatron.metrics import Console
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.rollout.responses import generate
from rto_megatron.stages.roles import load_role, tokenizer_of
from rto_megatron.stages.rules import check_run
from rto_megatron.stages.run import check_writable, json_lines, write_text

PROMPTS_AT_A_TIME = 512
"""Per replica: between two rounds the progress moves."""


def run(config: GenerateRun, runtime: Runtime) -> None:
    """Answer all prompts, in file order; the file is complete or not there."""
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    check_writable("out", config.out)
    check_run(config, mesh.data.size)
    model, checkpoint = load_role(
        config.checkpoint, "policy", mesh, parallel=config.parallel, compute=config.compute, frozen=True
    )
    tokenizer, console = tokenizer_of(checkpoint), Console(is_main())
    prompts, dropped = read_prompts(
        config.prompts, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens, too_long=config.too_long
    )
    prompts = prompts[: config.max_prompts]
    console.say(f"prompts: {dropped}; answering {len(prompts)}")
    size = PROMPTS_AT_A_TIME * mesh.data.size
    blocks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    answers = []
    with console.progress("generate", total=len(blocks)) as progress:
        for number, block in enumerate(blocks):
            answers += _answer(model, block, config, tokenizer, mesh)
            progress.done(number)
    if is_main():
        write_text("out", config.out, json_lines(answers))
    console.say(f"answers: {config.out}")


def _answer(
    model: PolicyModel, block: list[PromptRow], config: GenerateRun, tokenizer: Tokenizer, mesh: Mesh
) -> list[dict]:
    """The responses to a block of prompts, as they are written."""
    batch = prompt_batch([block[i] for i in share_of(len(block), mesh)])
    local = generate(
        model, batch, config.rollout, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, seed=config.seed, step=0
    )
    rollout = gather_rows(local, mesh).rows(range(len(block)))
    answers = []
    for row, prompt in enumerate(block):
        mask = rollout.response_mask[row]
        ids = rollout.tokens[row][mask].tolist()
        answers.append(
            {
                "prompt": prompt.text,
                "response": tokenizer.decode(ids),
                "tokens": ids,
                "log_probs": rollout.decode_log_probs[row][mask].tolist(),
                "truncated": bool(rollout.truncated[row]),
            }
        )
    return answers
