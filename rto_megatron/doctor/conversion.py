"""Can a conversion read its source, and does what it would build fit the layout."""

from functools import partial

from rto_megatron.config.run import ConvertRun
from rto_megatron.data.tokenizer import check_vocabulary
from rto_megatron.distributed.checkpoint import open_checkpoint
from rto_megatron.doctor.findings import Section
from rto_megatron.models.hf_config import config_from_hf, hf_class, scoring_from_hf
from rto_megatron.models.hf_weights import HuggingFaceFolder
from rto_megatron.stages.convert import (
    check_direction,
    check_out,
    check_scoring,
    choose_tokenizer,
    is_hugging_face,
    role_to_write,
)
from rto_megatron.stages.roles import tokenizer_of
from rto_megatron.stages.rules import architecture_rules


def check_conversion(found: Section, config: ConvertRun) -> None:
    """Direction, architecture, tokenizer and target."""
    found.attempt(partial(check_out, config.out), why="what is there is never written over")
    inward = found.attempt(
        partial(is_hugging_face, config.source), why="what it is decides the direction", way_out="name the right folder"
    )
    if inward is not None:
        found.attempt(partial(check_direction, config, inward=inward), why="it is about the other direction")
    if inward:
        _check_way_in(found, config)
    elif inward is not None:
        _check_way_out(found, config)


def _check_way_in(found: Section, config: ConvertRun) -> None:
    unknown = "weights of another architecture would give another model than theirs"
    model = found.attempt(
        partial(config_from_hf, config.source), why=unknown, way_out="take a model that the message allows"
    )
    found.attempt(
        partial(_look_at_headers, config), why="every weight must come from somewhere", way_out="copy the folder again"
    )
    tokenizer = found.attempt(partial(choose_tokenizer, config), why="a run folder holds its tokenizer")
    if model is None:
        return
    scoring = found.attempt(
        partial(scoring_from_hf, config.source), why="a reward is one number", way_out="take a reward model"
    )
    if tokenizer is not None:
        found.attempt(partial(check_vocabulary, tokenizer, model.vocab_size), why="ids would stand for other tokens")
        found.attempt(partial(check_scoring, config, scoring, tokenizer), why="a score read elsewhere is another score")
    for rule in architecture_rules(config, model, "the model"):
        found.attempt(rule.check, why=rule.why, way_out="choose a divisor")
    found.ok(f"{config.source} is a {hf_class(model, scoring)} of {model.num_layers} layers")


def _look_at_headers(config: ConvertRun) -> None:
    """Every tensor's shape and dtype; none is read."""
    folder = HuggingFaceFolder(config.source)
    for name in folder.names:
        folder.shape(name)


def _check_way_out(found: Section, config: ConvertRun) -> None:
    checkpoint = found.attempt(partial(open_checkpoint, config.source), why="it holds the weights")
    if checkpoint is None:
        return
    found.attempt(partial(role_to_write, config, checkpoint.manifest), why="one of the run's models is written")
    found.attempt(partial(tokenizer_of, checkpoint), why="it is written out too", way_out="restore the checkpoint")
