"""Whether a Hugging Face folder and a live Megatron model are the same model: tensor by tensor, and in what they say.

The two ways to the numbers share nothing but the files: transformers builds the model from the folder's config.json
and runs it on one process, ours runs in its layout. So a mistake in a table, a config or a file shows here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.batch import SFTBatch
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import Cut
from rto_megatron.data.collate import collate_sft
from rto_megatron.data.readers import SFTRow
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.chunks import model_chunks
from rto_megatron.distributed.collectives import broadcast_object, gather_objects
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.microbatches import Microbatch
from rto_megatron.distributed.replica import gather_over_tensor
from rto_megatron.distributed.runtime import is_main
from rto_megatron.distributed.step import Forward, head_outputs, score
from rto_megatron.errors import CheckpointError
from rto_megatron.models.heads import ScalarModel
from rto_megatron.models.hf_config import config_from_hf, scoring_from_hf
from rto_megatron.models.hf_export import hf_tensors
from rto_megatron.models.hf_tables import SCORE_BIAS
from rto_megatron.models.hf_weights import HuggingFaceFolder

TEXTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    "some one or other of their daughters.",
    "We hold these truths to be self-evident, that all men are created equal.",
    "Call me Ishmael.",
    "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura, ché la diritta via era smarrita.",
    "道可道，非常道。名可名，非常名。",  # noqa: RUF001 - as it is written
    "a = 0\nb = 1\nwhile b < 1000:\n    print(b, end=', ')\n    a, b = b, a + b\n",
)
"""Long and short, prose and code, three scripts; out of copyright (Austen, Jefferson, Melville, Dante, Laozi)."""

MAX_TOKENS = 64
"""Of one text."""

EXACT, BFLOAT16 = 1e-4, 2**-8
"""How far the live model may be from transformers, as a share of the largest logit or score (at least 1).

In float32 the same sums in another order differ by 5e-6 of it (SmolLM2-135M); a norm's epsilon of 1e-6 in place of
1e-5 makes 8e-4."""

NOISE = 4.0
"""In bfloat16 also: so many times as far as transformers in bfloat16 is from itself in float32, on the same texts.

No share would do for all: SmolLM2-135M's logits are off by 8 % of the largest in both, other models' by far less. A
few scores may by chance be less off than a few others, so twice as far would refuse sound models."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close the two came."""

    what: str
    """logits or scores."""
    difference: float
    """The largest, in nats or reward-model units."""
    allowed: float
    """Likewise."""

    def __str__(self) -> str:
        return (
            f"transformers agrees: every tensor is equal, and the {self.what} of {len(TEXTS)} texts differ by at most "
            f"{self.difference:.2g} ({self.allowed:.2g} is allowed)"
        )


def check_hf(
    model: MegatronModule, config: ModelConfig, folder: Path, tokenizer: Tokenizer, mesh: Mesh, *, cut: Cut
) -> Agreement:
    """Compare a folder with the live model: every tensor, config.json, and the logits or scores of real text.

    The main rank holds the whole model in float32 meanwhile.

    Args:
        cut: of the texts, for the live model.

    Raises:
        CheckpointError: they differ; with the first tensor, setting or layer that does.
    """
    _stop_if(_differing_tensor(model, config, folder), folder)
    _stop_if(_on_main(lambda: _differing_setting(config, folder), folder), folder)
    batch = text_rows(tokenizer, config)
    ask = head_outputs if isinstance(model, ScalarModel) else token_logits(config)
    live = score(model, batch.to(mesh.device), ask, mesh, cut=cut)
    dtype, what = model.config.params_dtype, "scores" if isinstance(model, ScalarModel) else "logits"
    share = BFLOAT16 if dtype == torch.bfloat16 else EXACT
    found: Agreement = _on_main(lambda: _compare_outputs(folder, batch, live.cpu(), dtype, share, what), folder)
    if not found.difference <= found.allowed:  # NaN is no agreement
        where = _differing_layer(model, folder, batch, ask, share, mesh)
        _stop_if(
            f"transformers gives other {what} than the live model: they differ by up to {found.difference:.3g}, "
            f"allowed is {found.allowed:.3g}; all tensors and settings agree, and the first output that does not is "
            f"that of {where}",
            folder,
        )
    return found


def text_rows(tokenizer: Tokenizer, config: ModelConfig) -> SFTBatch:
    """TEXTS as rows that close with EOS, where a score is read; cut to what the model can see."""
    longest = min(MAX_TOKENS, config.max_length) - 1
    rows = [[id for id in tokenizer.encode(text) if id != tokenizer.pad_id][:longest] for text in TEXTS]
    return collate_sft(
        [SFTRow(prompt_ids=ids[:1], response_ids=[*ids[1:], tokenizer.eos_id]) for ids in rows], tokenizer.pad_id
    )


def token_logits(config: ModelConfig) -> Forward:
    """A policy's logits of the true vocabulary, [B, T, V]; column t has seen token t. For a few short texts only."""

    def ask(model: Any, micro: Microbatch) -> Tensor:
        out = model(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params)
        if not model.post_process:
            return out
        return torch.cat(list(gather_over_tensor(out, model.pg_collection.tp)), -1)[..., : config.vocab_size]

    return Forward(ask, depth=(config.vocab_size,))


def _stop_if(problem: str | None, folder: Path) -> None:
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}")


def _on_main(action: Callable[[], Any], folder: Path) -> Any:
    """What `action` gives on rank 0, on every rank; a CheckpointError there is one everywhere."""
    found = problem = None
    if is_main():
        try:
            found = action()
        except CheckpointError as error:
            problem = str(error)
    found, problem = broadcast_object((found, problem))
    _stop_if(problem, folder)
    return found


def _differing_tensor(model: MegatronModule, config: ModelConfig, folder: Path) -> str | None:
    """The first tensor whose file holds other numbers than the live model, in words; all ranks must call."""
    problem = None
    for name, live in hf_tensors(model, config):  # to its end in any case: the other ranks are sending
        try:
            problem = problem or _difference(HuggingFaceFolder(folder), name, live)
        except CheckpointError as error:
            problem = str(error)
        del live
    return broadcast_object(problem)


def _difference(source: HuggingFaceFolder, name: str, live: Tensor) -> str | None:
    if name not in source.names:
        return f"{name}, which the live model has, is not there"
    if source.shape(name) != tuple(live.shape):
        return f"{name} has the shape {list(source.shape(name))}, in the live model {list(live.shape)}"
    stored = source.read(name).to(live.dtype)
    if torch.equal(stored, live):
        return None
    largest = (stored.double() - live.double()).abs().max()
    return f"{name} is the first tensor that differs from the live model's, by up to {largest:.3g}"


def _differing_setting(config: ModelConfig, folder: Path) -> str | None:
    """The first field of the architecture that config.json gives another value, in words."""
    theirs, ours = (replace(c, head_dim=c.kv_channels) for c in (config_from_hf(folder), config))
    for field in fields(ModelConfig):
        got, want = getattr(theirs, field.name), getattr(ours, field.name)
        if got != want:
            return f"config.json says {field.name} {got}, the live model has {want}"
    return None


def _compare_outputs(
    folder: Path, batch: SFTBatch, live: Tensor, dtype: torch.dtype, share: float, what: str
) -> Agreement:
    """The largest difference of logits or scores, and how large it may be.

    Args:
        live: [B, T, V] logits or [B, T] head outputs of the live model, on the CPU.
        dtype: of the live model. transformers' weights are rounded to it too.
        share: of the largest output, that the live model may be off.

    Raises:
        CheckpointError: transformers cannot load the folder, or leaves tensors out.
    """
    theirs, scoring = open_in_transformers(folder, dtype), scoring_from_hf(folder)
    lengths = batch.num_tokens.tolist()

    def outputs() -> Tensor:
        with torch.no_grad():
            rows = [theirs(input_ids=row[None, :n]).logits[0] for row, n in zip(batch.tokens, lengths, strict=True)]
        return torch.cat(rows).float() + (scoring.bias if scoring else 0.0)  # transformers' head has no bias

    rounded = outputs()
    theirs.float()
    exact = outputs()
    # a score is read at the last token, where each row has its EOS
    ours = torch.cat([row[n - 1 : n] if scoring else row[:n] for row, n in zip(live, lengths, strict=True)])
    noise = (rounded - exact).abs().max().item()  # 0 in float32
    return Agreement(
        what=what,
        difference=(ours - exact).abs().max().item(),
        allowed=share * max(1.0, exact.abs().max().item()) + NOISE * noise,
    )


def open_in_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's model in transformers, in `dtype` on the CPU.

    Raises:
        CheckpointError: transformers cannot load it, or not all of it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if scoring_from_hf(folder) else AutoModelForCausalLM
    try:
        with _quiet():
            loaded: Any = auto.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load it: {reason}") from None
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise CheckpointError(f"transformers looks for {absent[0]}, which is not there; it would be random")
    ignored = sorted(set(report["unexpected_keys"]) - {SCORE_BIAS, "lm_head.weight"})
    if ignored:
        raise CheckpointError(f"transformers has no place for {ignored[0]}, and would leave it out")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports: what is wrong is said in an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _differing_layer(model: Any, folder: Path, batch: SFTBatch, ask: Forward, share: float, mesh: Mesh) -> str:
    """The first module, by Hugging Face name, whose output differs on the longest text; all ranks must call."""
    row, dtype = batch.rows([int(batch.num_tokens.argmax())]), model.config.params_dtype
    modules: dict[str, Any] = {}
    for chunk in model_chunks(model):
        modules |= {"model.embed_tokens": chunk.embedding} if chunk.pre_process else {}
        modules |= {f"model.layers.{layer.layer_number - 1}": layer for layer in chunk.decoder.layers}
        modules |= {"model.norm": chunk.decoder.final_layernorm} if chunk.post_process else {}
    with _outputs_of(modules) as mine:
        score(model, row.to(mesh.device), ask, mesh, cut=Cut(rows=1))
    if model.config.sequence_parallel:  # each tensor rank has its share of the tokens
        mine = {name: torch.cat(list(gather_over_tensor(x, mesh.tensor.group))) for name, x in mine.items()}
    told = {name: x[: row.tokens.shape[1], 0].float().cpu() for name, x in mine.items()}
    live = {name: x for part in gather_objects(told) for name, x in part.items()}

    def compare() -> str:
        theirs = open_in_transformers(folder, dtype)
        rounded, exact = _layer_outputs(theirs, row), _layer_outputs(theirs.float(), row)
        for name, output in exact.items():
            if not _apart(live[name], output) <= share + NOISE * _apart(rounded[name], output):
                return name
        return "the head"

    return _on_main(compare, folder)


def _layer_outputs(theirs: Any, row: SFTBatch) -> dict[str, Tensor]:
    """[T, hidden] of each layer of a model in transformers, by name and in order."""
    modules = {"model.embed_tokens": theirs.model.embed_tokens}
    modules |= {f"model.layers.{i}": layer for i, layer in enumerate(theirs.model.layers)}
    with _outputs_of(modules | {"model.norm": theirs.model.norm}) as outputs, torch.no_grad():
        theirs(input_ids=row.tokens)
    return {name: output[0].float() for name, output in outputs.items()}


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest distance over the tokens, each as a share of its own length.

    Token by token, because on some tokens a few numbers are a thousand times as large as all others.
    """
    return ((x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-9)).max().item()


@contextmanager
def _outputs_of(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each module gives in the block's forward pass; of several outputs the first."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
