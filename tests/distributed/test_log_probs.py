"""Log-probs from sharded logits against the plain ones, gradients included."""

import pytest
import torch
from torch.nn import functional as F

from rto_megatron.algorithms.log_probs import token_entropy, token_log_probs
from tests.ranks import run_ranks

TOKENS, HIDDEN, ROWS = 37, 16, 128

CASES = {
    "all ids": (128, 1.0, 1000, ()),
    "chunks and temperature": (128, 0.7, 8, ()),
    "padding, part of it a whole rank": (60, 1.3, 5, ()),
    "banned ids on both ranks": (101, 1.0, 8, (0, 3, 77)),
}


def problem(vocab: int, banned: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([i for i in range(vocab) if i not in banned])
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(ROWS, HIDDEN, generator=generator)
    labels = allowed[torch.randint(len(allowed), (TOKENS,), generator=generator)]
    return hidden, weight, labels, torch.randn(TOKENS, 2, generator=generator)


def plain(vocab, temperature, banned):
    hidden, weight, labels, slopes = problem(vocab, banned)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = (hidden @ weight[:vocab].T).index_fill(1, torch.tensor(banned, dtype=torch.long), -torch.inf)
    row = F.pad(logits, (0, 0, 0, 1))[None]  # the plain ones score column t by the logits before it
    log_probs = token_log_probs(row, F.pad(labels, (1, 0))[None], temperature=temperature)
    out = torch.stack((log_probs, token_entropy(row, temperature=temperature)), -1)[0, 1:]
    (out * slopes).sum().backward()
    return out.detach(), hidden.grad, weight.grad


def sharded(vocab, temperature, chunk, banned):
    """This rank's output, the hidden gradient summed over ranks, and its rows' gradient."""
    from rto_megatron.config.parallel import ParallelConfig
    from rto_megatron.distributed.log_probs import linear_log_probs
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime, world_size

    mesh = build_mesh(ParallelConfig(tensor=world_size()), start_runtime(threads=1), seed=0)
    hidden, weight, labels, slopes = problem(vocab, banned)
    own = weight.chunk(mesh.tensor.size)[mesh.tensor.rank].clone().requires_grad_()
    hidden.requires_grad_()
    out = linear_log_probs(
        hidden,
        own,
        labels,
        group=mesh.tensor.group,
        vocab_size=vocab,
        temperature=temperature,
        chunk=chunk,
        banned_ids=banned,
    )
    (out * slopes).sum().backward()
    torch.distributed.all_reduce(hidden.grad, group=mesh.tensor.group)
    return out.detach(), hidden.grad, own.grad


def reference(vocab: int):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(ROWS, HIDDEN, generator=generator)


def plain_kl(vocab, temperature, banned):
    hidden, weight, _, slopes = problem(vocab, banned)
    hidden.requires_grad_(), weight.requires_grad_()
    ref_hidden, ref_weight = reference(vocab)
    ban = torch.tensor(banned, dtype=torch.long)
    log_probs, of_ref = (
        (h @ w[:vocab].T / temperature).index_fill(1, ban, -1e30).log_softmax(-1)
        for h, w in ((hidden, weight), (ref_hidden, ref_weight))
    )
    out = F.kl_div(log_probs, of_ref, reduction="none", log_target=True).sum(-1)
    (out * slopes[:, 0]).sum().backward()
    return out.detach(), hidden.grad, weight.grad


def sharded_kl(vocab, temperature, chunk, banned):
    """This rank's KL, the hidden gradient summed over ranks, and its rows' gradient."""
    from rto_megatron.config.parallel import ParallelConfig
    from rto_megatron.distributed.divergence import linear_kl
    from rto_megatron.distributed.log_probs import head_of
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime, world_size

    mesh = build_mesh(ParallelConfig(tensor=world_size()), start_runtime(threads=1), seed=0)
    hidden, weight, _, slopes = problem(vocab, banned)
    own, own_ref = (w.chunk(mesh.tensor.size)[mesh.tensor.rank].clone() for w in (weight, reference(vocab)[1]))
    hidden.requires_grad_(), own.requires_grad_()
    layer = {"vocab_size": vocab, "temperature": temperature, "chunk": chunk, "banned_ids": banned}
    out = linear_kl(hidden, own, reference(vocab)[0], own_ref, head_of(own, group=mesh.tensor.group, **layer))
    (out * slopes[:, 0]).sum().backward()
    torch.distributed.all_reduce(hidden.grad, group=mesh.tensor.group)
    return out.detach(), hidden.grad, own.grad


def all_cases():
    return {name: (sharded(*case), sharded_kl(*case)) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request):
    return run_ranks(all_cases, request.param)


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_plain_log_softmax(name, results):
    vocab, temperature, _, banned = CASES[name]
    out, grad_hidden, grad_weight = plain(vocab, temperature, banned)
    check([result[name][0] for result in results], out, grad_hidden, grad_weight, vocab)


@pytest.mark.parametrize("name", CASES)
def test_the_kl_to_a_reference_equals_the_plain_one(name, results):
    vocab, temperature, _, banned = CASES[name]
    check([result[name][1] for result in results], *plain_kl(vocab, temperature, banned), vocab)


def check(ranks, out, grad_hidden, grad_weight, vocab):
    for said, slope, _ in ranks:
        torch.testing.assert_close(said, out, rtol=2e-6, atol=1e-5)  # KLs of up to 40 nats: float32 has 7 digits
        torch.testing.assert_close(slope, grad_hidden, rtol=0, atol=3e-5)
    own = torch.cat([rows for *_, rows in ranks])
    torch.testing.assert_close(own, grad_weight, rtol=0, atol=3e-5)
    assert not own[vocab:].any()


def no_tokens():
    out, grad_hidden, grad_weight = None, None, None
    from rto_megatron.config.parallel import ParallelConfig
    from rto_megatron.distributed.log_probs import linear_log_probs
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime

    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.zeros(ROWS, HIDDEN, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    out = linear_log_probs(hidden, weight, labels, group=mesh.tensor.group, vocab_size=ROWS)
    out.sum().backward()
    grad_hidden, grad_weight = hidden.grad, weight.grad
    return out.shape, grad_hidden.shape, grad_weight.abs().sum().item()


def test_a_microbatch_without_response_tokens_gives_no_gradient():
    assert run_ranks(no_tokens, 1) == [((0, 2), (0, HIDDEN), 0.0)]
