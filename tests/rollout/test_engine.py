"""What the engine writes depends on weights and request alone, and is what the model says elsewhere."""

import zlib

import pytest
import torch

from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.distributed.shards import shards
from rto_megatron.errors import DataError
from rto_megatron.models.gpt import build_model
from rto_megatron.models.hf_weights import load_hf
from rto_megatron.rollout.engine import Request, RolloutEngine, cut_prompts
from tests.ranks import run_ranks

VOCAB = 200
EOS = tuple(range(0, VOCAB, 25))
PAD = 3
TINY = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "vocab_size": VOCAB, "init_std": 0.2}


def make_model(parallel=None, *, banned_ids=(), **architecture):
    parallel = ParallelConfig(**parallel or {})
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    config = ModelConfig(**(TINY | architecture))
    model = build_model(config, mesh, kind="policy", parallel=parallel, compute=ComputeConfig(), banned_ids=banned_ids)
    return model, config


def mixed_requests():
    """Prompts of 2 to 20 tokens, windows of 3 to 14, every way of sampling."""
    g = torch.Generator().manual_seed(3)
    ways = [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20}, {"top_k": 9, "top_p": 0.8}]
    for uid in range(18):
        length, window = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((2, 21), (3, 15)))
        prompt = tuple(torch.randint(0, VOCAB, (length,), generator=g).tolist())
        yield Request(uid=uid, prompt=prompt, max_new_tokens=window, seed=77 + uid, **ways[uid % 6])


WAYS = {
    "all at once": (18, 1, {}),
    "one by one": (1, 1, {}),
    "three slots": (3, 1, {}),
    "five slots, backwards": (5, -1, {}),
    "prompts by one token": (5, 1, {"prefill_chunk_tokens": 1}),
    "prompts by seven tokens": (5, -1, {"prefill_chunk_tokens": 7}),
    "prompts by fifty tokens": (18, 1, {"prefill_chunk_tokens": 50}),
    "recorded steps": (13, 1, {"recorded": True}),
    "recorded steps, prompts by seven tokens": (5, -1, {"prefill_chunk_tokens": 7, "recorded": True}),
    "blocks, all at once": (18, 1, {"kv_block_tokens": 4}),
    "blocks": (5, -1, {"kv_block_tokens": 4}),
    "blocks, prompts by seven tokens": (5, -1, {"kv_block_tokens": 3, "prefill_chunk_tokens": 7}),
    "few blocks": (18, 1, {"kv_block_tokens": 4, "kv_blocks": 26}),
    "blocks, recorded steps": (13, 1, {"kv_block_tokens": 4, "recorded": True}),
}
"""(slots, order of the requests, options of the engine)"""


def write_mixed(parallel, ways):
    model, _ = make_model(parallel, banned_ids=(PAD,))
    requests, done = list(mixed_requests()), {}
    for way in ways:
        slots, order, more = WAYS[way]
        if "recorded" in more and model.pg_collection.pp.size() > 1:
            continue
        engine = RolloutEngine(model, max_slots=slots, max_length=64, eos_ids=EOS, **more)
        done[way] = list(engine.generate(requests[::order]))
    return done


@pytest.fixture(scope="module")
def one_process():
    return run_ranks(write_mixed, 1, {}, tuple(WAYS))[0]


def assert_same_responses(got, want):
    got, want = (sorted(completions, key=lambda c: c.uid) for completions in (got, want))
    assert [(c.uid, c.tokens, c.truncated) for c in got] == [(c.uid, c.tokens, c.truncated) for c in want]
    for g, w in zip(got, want, strict=True):
        assert g.log_probs == pytest.approx(w.log_probs, abs=2e-5)


def test_a_pass_over_prompts_has_a_token_at_least():
    with pytest.raises(ValueError, match=r"rollout\.prefill_chunk_tokens must be 1 or more or null, got 0"):
        RolloutConfig(prefill_chunk_tokens=0)


def test_prompts_are_cut_into_passes_of_so_many_tokens():
    assert cut_prompts([3, 5, 2], 4) == [[(0, range(0, 3)), (1, range(0, 1))], [(1, range(1, 5))], [(2, range(0, 2))]]
    assert cut_prompts([3, 5], None) == [[(0, range(0, 3)), (1, range(0, 5))]]
    assert cut_prompts([6], 2) == [[(0, range(0, 2))], [(0, range(2, 4))], [(0, range(4, 6))]]


def test_a_response_does_not_depend_on_slots_order_batch_mates_or_passes_over_prompts(one_process):
    for completions in one_process.values():
        assert_same_responses(completions, one_process["all at once"])


SAME_BITS = {
    "blocks, all at once": "all at once",
    "blocks": "five slots, backwards",
    "blocks, prompts by seven tokens": "prompts by seven tokens",
    "blocks, recorded steps": "recorded steps",
}
"""Ways whose passes have the same shapes."""


def assert_same_bits(done):
    for way, other in SAME_BITS.items():
        if way in done:
            assert done[way] == done[other]


def num_taken(batch):
    tables = batch._cache.store.tables
    return tables.num_blocks - 1 - len(tables._free)  # block 0 is nobody's


def count_blocks():
    """Most blocks that were taken at a time, and most responses under way, where 26 blocks are all there is."""
    model, _ = make_model()
    engine = RolloutEngine(model, max_slots=18, max_length=64, eos_ids=EOS, kv_block_tokens=4, kv_blocks=26)
    taken, live, batches = [], [], []
    make = engine.batch

    def watched(requests):
        batch = make(requests)
        batches.append(batch)
        retire = batch._retire

        def counted():
            taken.append(num_taken(batch))
            live.append(batch.num_live)
            return retire()

        batch._retire = counted
        return batch

    engine.batch = watched
    num = len(list(engine.generate(list(mixed_requests()))))
    (batch,) = batches
    store = batch._cache.store
    return num, max(taken), max(live), num_taken(batch), store.tables.num_blocks, store._keys[0].shape[0]


def test_a_pool_that_is_too_small_for_all_lets_them_begin_as_it_has_room_and_never_grows():
    num, most_taken, most_live, left, num_blocks, size = run_ranks(count_blocks, 1)[0]
    assert num == 18 and left == 0
    assert most_taken < num_blocks <= size == 1 + 26
    assert 1 < most_live < 18


def test_blocks_change_no_bit_of_a_response(one_process):
    assert_same_bits(one_process)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2},
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        pytest.param({"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_response_does_not_depend_on_the_layout(one_process, parallel):
    world = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    ranks = run_ranks(
        write_mixed,
        world,
        parallel,
        ("all at once", "five slots, backwards", "prompts by seven tokens", "recorded steps", *SAME_BITS),
    )
    assert_same_bits(ranks[0])
    assert all(rank == ranks[0] for rank in ranks)  # in the same order too: streaming must not tear ranks apart
    for way, completions in ranks[0].items():
        assert_same_responses(completions, one_process[way])
        assert [c.uid for c in completions] == [c.uid for c in one_process[way]]


def test_an_eos_ends_a_response_and_a_full_window_truncates_it(one_process):
    windows = {request.uid: request.max_new_tokens for request in mixed_requests()}
    ended = [c for c in one_process["three slots"] if not c.truncated]
    full = [c for c in one_process["three slots"] if c.truncated]
    assert len(ended) > 3 and len(full) > 3
    assert all(c.tokens[-1] in EOS for c in ended)
    assert all(len(c.tokens) == windows[c.uid] for c in full)
    for completion in ended + full:
        assert len(completion.tokens) == len(completion.log_probs) <= windows[completion.uid]
        assert not set(completion.tokens[:-1]) & set(EOS)
        assert PAD not in completion.tokens and max(completion.tokens) < VOCAB


def test_responses_stream_out_in_the_step_they_end(one_process):
    lengths = [len(c.tokens) for c in one_process["all at once"]]
    assert lengths == sorted(lengths)
    # With one slot they end in the order they came.
    assert [c.uid for c in one_process["one by one"]] == list(range(18))


def scramble(model):
    """Give norms and biases values of their own, the same in every layout."""
    for shard in shards(model):
        if "norm" in shard.key or shard.key.endswith("bias"):
            g = torch.Generator().manual_seed(zlib.crc32(shard.name.encode()))
            shard.data.copy_((1 + 0.5 * torch.randn(shard.full_shape, generator=g))[shard.slices])


def compare_with_training_forward(parallel, architecture):
    """Largest difference of log-probs over three temperatures, and whether training goes on as before."""
    model, _ = make_model(parallel, **architecture)
    with torch.no_grad():
        scramble(model)
    model.train()
    worst = 0.0
    for temperature in (1.0, 0.7, 0.0):
        model.temperature = temperature or 1.0
        prompts = [tuple(range(5, 5 + n)) for n in (1, 4, 4, 9)]
        requests = [
            Request(uid=uid, prompt=prompt, max_new_tokens=9, seed=uid, temperature=temperature)
            for uid, prompt in enumerate(prompts)
        ]
        engine = RolloutEngine(model, max_slots=3, max_length=64, eos_ids=())
        for completion in engine.generate(requests):
            assert torch.is_grad_enabled(), "a consumer between two completions may train"
            tokens = torch.tensor([[*prompts[completion.uid], *completion.tokens]])
            if parallel.get("sequence") and tokens.shape[1] % 2:
                tokens = torch.nn.functional.pad(tokens, (0, 1))
            mask = torch.zeros_like(tokens, dtype=torch.bool)
            start = len(prompts[completion.uid])
            mask[0, start : start + 9] = True
            positions = torch.arange(tokens.shape[1])[None]
            out = model(input_ids=tokens, position_ids=positions, attention_mask=None, loss_mask=mask)
            out.sum().backward()
            difference = out[0, :, 0][mask[0]] - torch.tensor(completion.log_probs)
            worst = max(worst, difference.abs().max().item())
    assert model.training
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return worst


@pytest.mark.parametrize(
    ("parallel", "architecture"),
    [
        ({}, {"tie_embeddings": False, "head_dim": 10}),
        ({}, {"qkv_bias": True, "qk_norm": True, "num_query_groups": 4}),
        # one kv head on two ranks, and a vocabulary whose second half is nothing but padding
        ({"tensor": 2}, {"num_query_groups": 1, "qkv_bias": True, "vocab_size": 60}),
        ({"tensor": 2, "sequence": True}, {"qk_norm": True, "tie_embeddings": False}),
    ],
    ids=str,
)
def test_log_probs_are_those_of_the_training_forward(parallel, architecture):
    for worst in run_ranks(compare_with_training_forward, parallel.get("tensor", 1), parallel, architecture):
        assert worst < 2e-5


def compare_with_transformers(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=list(EOS),
            pad_token_id=PAD,
        )
    ).eval()
    hf.save_pretrained(folder)
    model, config = make_model(num_attention_heads=4, num_query_groups=2, tie_embeddings=False)
    load_hf(model, folder, config)
    g = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(0, VOCAB, (n,), generator=g).tolist()) for n in (1, 2, 5, 5, 11, 17, 23, 30)]
    requests = [
        Request(uid=uid, prompt=prompt, max_new_tokens=30, seed=uid, temperature=0.0)
        for uid, prompt in enumerate(prompts)
    ]
    engine = RolloutEngine(model, max_slots=3, max_length=64, eos_ids=EOS)
    ours = sorted(engine.generate(requests), key=lambda c: c.uid)
    theirs = [
        hf.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    return [c.tokens for c in ours], theirs


def test_greedy_output_is_that_of_transformers_token_for_token(tmp_path):
    ours, theirs = run_ranks(compare_with_transformers, 1, tmp_path)[0]
    assert ours == theirs
    assert len({len(tokens) for tokens in ours}) > 2


def edge_cases():
    model, _ = make_model()
    request = Request(uid=7, prompt=(1, 2, 3, 4), max_new_tokens=50, seed=0)
    engine = RolloutEngine(model, max_slots=2, max_length=6, eos_ids=())
    messages = []
    for prompt in ((), (1,) * 6, (1, VOCAB)):
        try:
            engine.generate([request, Request(uid=9, prompt=prompt, max_new_tokens=1, seed=0)])
        except DataError as error:
            messages.append(str(error))
    (completion,) = engine.generate([request])
    return completion, list(engine.generate([])), messages


def test_the_models_window_truncates_and_prompts_that_do_not_fit_are_refused_before_anything_runs():
    completion, nothing, messages = run_ranks(edge_cases, 1)[0]
    assert len(completion.tokens) == 2 and completion.truncated  # 4 + 2 = 6
    assert nothing == []
    empty, long, unknown = messages
    assert empty == "prompt 9: needs at least one token, got none"
    assert long.startswith("prompt 9: its 6 tokens leave no room for a response, as both together may have 6;")
    assert unknown.startswith(f"prompt 9: ids must lie below the model's vocabulary of {VOCAB}, got {VOCAB};")
