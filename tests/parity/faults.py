"""Faults to plant in the ranks of a layout, at least one for each line of the parity certificate.

Each is a mistake that a parallel trainer can make and still train: a sum over ranks that is left out, a rank that does
something else than the others, a formula that gets another's input. A plant is called with a pytest.MonkeyPatch and
the rank, in a rank process.
"""

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

LAYOUTS = {
    "tensor 2": ["--parallel.tensor=2"],
    "tensor 2, sequence parallel": ["--parallel.tensor=2", "--parallel.sequence=true"],
    "pipeline 2": ["--parallel.pipeline=2"],
    "context 2": ["--parallel.context=2"],
    "data 2": [],
}
"""Name -> command-line words; two ranks each."""


@dataclasses.dataclass(frozen=True)
class Fault:
    line: str
    """The first line of the certificate that it must turn to FAIL."""
    layout: str
    plant: Callable[[Any, int], None]


def wrap(patch: Any, target: str, make: Callable[[Any], Any]) -> None:
    """Replace what `target` names by `make(what it is)`."""
    patch.setattr(target, make(pkgutil.resolve_name(target)))


def given(target: str, *, only: int | None = None, **arguments: Any) -> Callable[[Any, int], None]:
    """Plant: the function gets other keyword arguments, on rank `only` or on both."""

    def plant(patch: Any, rank: int) -> None:
        if only in (None, rank):
            wrap(patch, target, lambda real: lambda *args, **named: real(*args, **(named | arguments)))

    return plant


def returns(target: str, change: Callable[[Any], Any], *, only: int | None = None) -> Callable[[Any, int], None]:
    """Plant: the function's result is changed, on rank `only` or on both."""

    def plant(patch: Any, rank: int) -> None:
        if only in (None, rank):
            wrap(patch, target, lambda real: lambda *args, **named: change(real(*args, **named)))

    return plant


def fields(record: Any, **changes: Callable[[Any], Any]) -> Any:
    """The record with each field replaced by what `change(record)` gives."""
    return dataclasses.replace(record, **{name: change(record) for name, change in changes.items()})


def other_judges(**changes: Callable[[Any], Any]) -> Callable[[Any, int], None]:
    """Plant: other frozen models are loaded than those that the config names."""
    return returns("rto_megatron.stages.actors.load_judges", lambda judges: fields(judges, **changes))


def around_step(role: str, *, before: Callable = lambda _: None, after: Callable = lambda _: None, rate: float = 1.0):
    """Plant: something happens to a role before and after its optimizer step on rank 1, or it takes another rate."""

    def make(real: Callable) -> Callable:
        def step(trainable: Any, lr: float) -> float:
            if trainable.name != role:
                return real(trainable, lr)
            before(trainable)
            norm = real(trainable, lr * rate)
            after(trainable)
            return norm

        return step

    def plant(patch: Any, rank: int) -> None:
        if rank == 1:
            wrap(patch, "rto_megatron.distributed.optimizer.Trainable.step", make)

    return plant


def exchange_gradients(trainable: Any) -> None:
    """Between the first two weights of one shape: the norm of all gradients stays."""
    seen: dict[torch.Size, Any] = {}
    for name, weight in trainable.model.named_parameters():
        if name.endswith("linear_proj.weight"):
            if weight.shape in seen:
                other = seen[weight.shape]
                held = other.main_grad.clone()
                other.main_grad.copy_(weight.main_grad)
                weight.main_grad.copy_(held)
                return
            seen[weight.shape] = weight
    raise AssertionError("no two weights of one shape")


def drift(trainable: Any) -> None:
    """One element of one weight by the last bit."""
    weight = trainable.model.decoder.final_layernorm.weight.data
    weight[0] = torch.nextafter(weight[0], weight.new_tensor(2.0))


def load_other_rows(patch: Any, rank: int) -> None:
    def make(real: Callable) -> Callable:
        def load(model: Any, *rest: Any) -> None:
            real(model, *rest)
            rows = model.embedding.word_embeddings.weight.data
            rows.copy_(rows.roll(rank, 0))

        return load

    wrap(patch, "rto_megatron.stages.roles.load_weights", make)


def draw_own_head(patch: Any, rank: int) -> None:
    def make(real: Callable) -> Callable:
        def load(path: Any, kind: str, mesh: Any, *, frozen: bool, **rest: Any) -> Any:
            model, checkpoint = real(path, kind, mesh, frozen=frozen, **rest)
            if kind == "value" and not frozen and rank == 1:
                model.value_head.weight.data.normal_()
            return model, checkpoint

        return load

    wrap(patch, "rto_megatron.stages.actors.load_role", make)


def drop_matrix_sum(patch: Any, _: int) -> None:
    patch.setattr(
        "megatron.core.tensor_parallel.layers.reduce_from_tensor_model_parallel_region", lambda x, group=None: x
    )


def own_random_streams(patch: Any, rank: int) -> None:
    wrap(patch, "rto_megatron.rollout.responses.request_seed", lambda real: lambda *key: real(*key) + rank)


def half_normaliser_in_sampling(patch: Any, _: int) -> None:
    def first_everywhere(parts: torch.Tensor) -> torch.Tensor:
        parts[:, 3] = parts[:1, 3].clone()
        return parts

    returns("rto_megatron.rollout.sampling.gather_over_tensor", first_everywhere)(patch, _)


def half_normaliser_in_scoring(patch: Any, _: int) -> None:
    def make(real: Callable) -> Callable:
        def merge(local: torch.Tensor, group: Any) -> Any:
            whole, out = real(local, group)
            own = local[:, 0]
            return own, torch.stack((out[:, 0] + whole - own, out[:, 1]), -1)

        return merge

    wrap(patch, "rto_megatron.distributed.log_probs._merge", make)


def half_entropy(patch: Any, _: int) -> None:
    def make(real: Callable) -> Callable:
        def merge(local: torch.Tensor, group: Any) -> Any:
            whole, out = real(local, group)
            return whole, torch.stack((out[:, 0], local[:, 1]), -1)

        return merge

    wrap(patch, "rto_megatron.distributed.log_probs._merge", make)


def moments_of_own_rows(patch: Any, rank: int) -> None:
    def make(real: Callable) -> Callable:
        def moments(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            own = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
            return real(x[own], mask[own])

        return moments

    wrap(patch, "rto_megatron.rollout.experience.masked_moments", make)


def no_gradient_sum(patch: Any, _: int) -> None:
    patch.setattr("rto_megatron.distributed.optimizer.finalize_model_grads", lambda *args, **named: None)


def mean_over_microbatches(patch: Any, _: int) -> None:
    """Megatron's own default: it divides by the number of microbatches what is divided by the tokens already."""

    def without(trainable: Any) -> Any:
        trainable.model.config.calculate_per_token_loss = False
        return trainable

    returns("rto_megatron.stages.actors.make_trainable", without)(patch, _)


def unsynchronised_head(patch: Any, _: int) -> None:
    def make(real: Callable) -> Callable:
        def init(head: Any, *args: Any) -> None:
            real(head, *args)
            for parameter in head.parameters():
                parameter.sequence_parallel = False

        return init

    wrap(patch, "rto_megatron.models.heads.ScalarHead.__init__", make)


def learn_from_advantages(patch: Any, rank: int) -> None:
    def make(real: Callable) -> Callable:
        def make_loss(*args: Any) -> Callable:
            loss = real(*args)
            return lambda output, batch: loss(output, fields(batch, returns=lambda b: b.advantages))

        return make_loss

    if rank == 1:
        wrap(patch, "rto_megatron.stages.update.make_value_loss", make)


def rate_of_one_role(role: str) -> Callable[[Any, int], None]:
    def plant(patch: Any, rank: int) -> None:
        def make(real: Callable) -> Callable:
            def rate(config: Any, done: int, plan: Any) -> float:
                # both optimizers of the test have one config but for the warm-up
                return real(config, done + rank * (config.warmup_frac == RATES[role]), plan)

            return rate

        wrap(patch, "rto_megatron.stages.update.learning_rate", make)

    return plant


RATES = {"policy": 0.5, "critic": 0.25}
"""Warm-up of each role's optimizer, by which a fault tells them apart."""


def stale(name: str) -> Callable[[Any, int], None]:
    """Plant: rank 1 answers with the signal of the first time it was asked."""

    def plant(patch: Any, rank: int) -> None:
        first: list[Any] = []

        def keep(found: Any) -> Any:
            rollout, signals = found
            first.append(getattr(signals, name))
            return rollout, dataclasses.replace(signals, **{name: first[0]})

        returns("rto_megatron.parity.leg.judge", keep, only=1)(patch, rank)

    return plant


ACTORS, EXPERIENCE = "rto_megatron.stages.actors", "rto_megatron.rollout.experience"

FAULTS = {
    "a tensor rank loads other rows of the embedding": Fault("start/policy_weights", "tensor 2", load_other_rows),
    "a replica draws a critic head of its own": Fault("start/critic_weights", "data 2", draw_own_head),
    "matrix products are not summed over tensor ranks": Fault("signal/policy_log_probs", "tensor 2", drop_matrix_sum),
    "decoding does not sum over tensor ranks": Fault(
        "rollout/tokens",
        "tensor 2",
        lambda patch, _: patch.setattr("rto_megatron.rollout.forward.sum_over_tensor", lambda x, group: x),
    ),
    "a replica samples from streams of its own": Fault("rollout/tokens", "data 2", own_random_streams),
    "sampling normalises over half of the vocabulary": Fault(
        "rollout/decode_log_probs", "tensor 2", half_normaliser_in_sampling
    ),
    "scoring normalises over half of the vocabulary": Fault(
        "signal/policy_log_probs", "tensor 2", half_normaliser_in_scoring
    ),
    "the reference is the DPO run": Fault(
        "signal/ref_log_probs", "pipeline 2", other_judges(reference=lambda judges: judges.dpo)
    ),
    "the DPO policy is the reference": Fault(
        "signal/dpo_log_probs", "pipeline 2", other_judges(dpo=lambda judges: judges.reference)
    ),
    "values are read behind their token": Fault(
        "signal/values", "data 2", returns(f"{ACTORS}.state_values", lambda x: x.roll(-1, 1))
    ),
    "scores are read before the last token": Fault(
        "signal/raw_scores",
        "tensor 2, sequence parallel",
        lambda patch, _: wrap(
            patch, f"{ACTORS}.sequence_scores", lambda real: lambda outputs, num_tokens: real(outputs, num_tokens - 1)
        ),
    ),
    "a replica normalises scores by its own mean": Fault(
        "signal/scores", "data 2", given(f"{ACTORS}.normalise_scores", only=1, mean=0.5)
    ),
    "a rank does not clip the DPO reward": Fault(
        "reward/dpo", "tensor 2", given(f"{EXPERIENCE}.shape_token_rewards", only=1, dpo_clip=None)
    ),
    "a rank does not scale the DPO reward": Fault(
        "reward/dpo", "data 2", given(f"{EXPERIENCE}.shape_token_rewards", only=1, dpo_coef=1.0)
    ),
    "a rank has another KL coefficient": Fault(
        "reward/kl", "pipeline 2", given(f"{EXPERIENCE}.shape_token_rewards", only=1, kl_coef=0.02)
    ),
    "a rank leaves the score out": Fault(
        "reward/score", "data 2", given(f"{EXPERIENCE}.shape_token_rewards", only=1, score_coef=0.0)
    ),
    "a rank adds up other terms": Fault(
        "reward/total",
        "data 2",
        returns(f"{EXPERIENCE}.shape_token_rewards", lambda r: fields(r, total=lambda r: r.dpo + r.score), only=1),
    ),
    "a rank looks further ahead": Fault("advantage/raw", "tensor 2", given(f"{EXPERIENCE}.gae", only=1, lam=1.0)),
    "returns lack the values": Fault(
        "advantage/returns", "pipeline 2", returns(f"{EXPERIENCE}.gae", lambda found: (found[0], found[0]))
    ),
    "advantages are whitened by replica": Fault("advantage/whitened", "data 2", moments_of_own_rows),
    "advantages are not whitened": Fault(
        "advantage/whitened", "tensor 2", lambda patch, _: patch.setattr(f"{EXPERIENCE}.whiten", lambda x, *_: x)
    ),
    "losses are divided by a replica's rows": Fault(
        "policy/loss", "data 2", returns("rto_megatron.stages.update.loss_count", lambda count: count // 2)
    ),
    "entropies are of half of the vocabulary": Fault("policy/entropy", "tensor 2", half_entropy),
    "gradients are not summed over replicas": Fault("policy/grad_norm", "data 2", no_gradient_sum),
    "gradients of norms are not summed over tensor ranks": Fault(
        "policy/grad_norm", "tensor 2, sequence parallel", no_gradient_sum
    ),
    "gradients are divided by the number of microbatches": Fault(
        "policy/grad_norm", "pipeline 2", mean_over_microbatches
    ),
    "a rank is a step ahead in the policy's schedule": Fault(
        "policy/learning_rate", "data 2", rate_of_one_role("policy")
    ),
    "two weights of the policy get each other's gradient": Fault(
        "policy/gradient", "pipeline 2", around_step("policy", before=exchange_gradients)
    ),
    "a pipeline stage steps further": Fault("policy/weights", "pipeline 2", around_step("policy", rate=1.01)),
    "a copy of a policy norm drifts": Fault("policy/copies", "tensor 2", around_step("policy", after=drift)),
    "a replica's critic learns from advantages": Fault("critic/loss", "data 2", learn_from_advantages),
    "the value head is not synchronised over tensor ranks": Fault(
        "critic/grad_norm", "tensor 2, sequence parallel", unsynchronised_head
    ),
    "a rank is a step ahead in the critic's schedule": Fault(
        "critic/learning_rate", "tensor 2", rate_of_one_role("critic")
    ),
    "two weights of the critic get each other's gradient": Fault(
        "critic/gradient", "pipeline 2", around_step("critic", before=exchange_gradients)
    ),
    "a pipeline stage of the critic steps further": Fault(
        "critic/weights", "pipeline 2", around_step("critic", rate=1.01)
    ),
    "a copy of a critic norm drifts": Fault("critic/copies", "data 2", around_step("critic", after=drift)),
    "a rank remembers log-probs of the policy before": Fault(
        "after/policy_log_probs", "tensor 2", stale("policy_log_probs")
    ),
    "a rank remembers values of the critic before": Fault("after/values", "data 2", stale("values")),
}
"""What is wrong -> where it is planted, and the line that must say so first."""
