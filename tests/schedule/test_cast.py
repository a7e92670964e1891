"""Who is on which rank: arithmetic of config and world."""

import pytest

from rto_megatron.config.load import load_run
from rto_megatron.errors import ConfigError
from rto_megatron.schedule.cast import cast_of, least_ranks, sizes_of

NEEDED = ["--run_dir=r", "--policy=p", "--reference=f", "--dpo=d", "--reward_model=w", "--data.train=t"]


def config(*words):
    return load_run("rto", None, [*NEEDED, *words])


SPLIT = ["--schedule.map=split", "--schedule.rollout_ranks=2", "--parallel.tensor=2"]


def test_in_a_split_policy_trainers_come_first_then_writers_then_the_critics_own():
    cast = cast_of(config(*SPLIT, "--schedule.critic_ranks=1", "--schedule.critic.tensor=1"), 7)
    assert (cast.policy.ranks, cast.engine.ranks, cast.critic.ranks) == (range(4), range(4, 6), range(6, 7))
    assert cast.groups == ((0, 1), (2, 3), (4, 5), (6,))
    assert [cast.group_of(rank) for rank in range(7)] == [0, 0, 1, 1, 2, 2, 3]
    place = cast.placement
    assert (place.policy, place.engines, place.critic, place.scorers) == ((0, 1), (2,), (3,), (0, 1))


def test_a_replicas_pipeline_stages_are_farthest_apart_as_megatron_lays_them():
    cast = cast_of(config("--schedule.map=fused", "--parallel.tensor=2", "--parallel.pipeline=2"), 8)
    assert cast.groups == ((0, 1, 4, 5), (2, 3, 6, 7))
    axes = ["--parallel.tensor=2", "--parallel.context=2", "--parallel.pipeline=2"]
    assert cast_of(config("--schedule.map=fused", *axes), 16).groups == (
        (0, 1, 2, 3, 8, 9, 10, 11),
        (4, 5, 6, 7, 12, 13, 14, 15),
    )


def test_who_only_writes_has_no_context_axis_unless_it_is_asked_for():
    words = [*SPLIT, "--parallel.context=2"]
    assert cast_of(config(*words), 6).groups == ((0, 1, 2, 3), (4, 5))
    shared = cast_of(config(*words, "--schedule.score=all", "--schedule.rollout_ranks=4"), 8)
    assert shared.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    asked = ["--schedule.rollout.context=2", "--schedule.rollout_ranks=4"]
    assert cast_of(config(*words, *asked), 8).engine.parallel.sizes == "tensor 1 x context 2 x pipeline 1"


@pytest.mark.parametrize(
    ("words", "world", "lanes"),
    [
        (["--schedule.map=colocated"], 3, 3),
        (["--schedule.map=split", "--schedule.rollout_ranks=1"], 3, 2),  # two train: two lanes, as if they wrote
        (["--schedule.map=split", "--schedule.rollout_ranks=2"], 3, 2),
        (["--schedule.map=split", "--schedule.rollout_ranks=2"], 5, 4),
        (["--schedule.map=colocated", "--schedule.lanes=8"], 2, 8),
    ],
)
def test_lanes_are_the_fewest_that_who_write_can_share(words, world, lanes):
    assert cast_of(config(*words), world).lanes == lanes
    assert sizes_of(config(*words), cast_of(config(*words), world)).lanes == lanes


def test_the_fewest_ranks_are_one_replica_and_what_is_asked_for_beside_it():
    assert least_ranks(config(*SPLIT, "--schedule.critic_ranks=2")) == 6
    assert least_ranks(config("--parallel.pipeline=2")) == 2


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (
            SPLIT,
            2,
            r"critic_ranks 0 leave no rank of 2 to train the policy; start 4 ranks or more",
        ),
        (SPLIT, 5, r"parallel: tensor 2 x pipeline 1 does not divide its 3 ranks; give it a multiple of 2"),
        (
            [*SPLIT, "--schedule.critic_ranks=1"],
            5,
            r"schedule.critic: tensor 2 x pipeline 1 does not divide its 1 ranks",
        ),
        (["--schedule.map=colocated", "--schedule.lanes=3"], 2, r"schedule.lanes must be a multiple of the 2 replicas"),
        (
            ["--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.critic_ranks=3"],
            5,
            "samples_per_optimizer_step must be a multiple of the 3 replicas of the critic, got 16",
        ),
    ],
)
def test_what_cannot_be_dealt_out_is_the_users_mistake(words, world, message):
    with pytest.raises(ConfigError, match=message):
        cast_of(config(*words), world)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule.map=split"], "schedule.rollout_ranks must be 1 or more with schedule.map split, got 0"),
        (
            ["--schedule.rollout.tensor=2"],
            "schedule.rollout needs schedule.map split, got tensor 2 x pipeline 1 with schedule.map sequential",
        ),
        (
            ["--schedule.rollout_ranks=1"],
            "schedule.rollout_ranks needs schedule.map split, got 1 with schedule.map sequential; set",
        ),
        (
            ["--schedule.map=fused", "--schedule.staleness=1"],
            "schedule.staleness needs schedule.map split, got 1 with schedule.map fused",
        ),
        (
            [*SPLIT, "--schedule.critic.tensor=1"],
            "schedule.critic needs schedule.critic_ranks of 1 or more, got tensor 1 x pipeline 1 and 0 ranks",
        ),
        (
            [*SPLIT, "--schedule.rollout.tensor=1", "--schedule.score=all"],
            "schedule.score must be train where schedule.rollout gives a layout of its own, got all",
        ),
        ([*SPLIT, "--schedule.slice_steps=0"], "schedule.slice_steps must be 1 or more, got 0"),
        (
            [*SPLIT, "--schedule.critic_ranks=2", "--advantage.estimator=reinforce_pp"],
            "schedule.critic_ranks must be 0 without a critic",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        config(*words)
