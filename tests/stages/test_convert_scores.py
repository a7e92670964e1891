"""Reward models and critics as Hugging Face sequence classifiers, and back into runs that use them."""

import json
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.config.run import ConvertRun
from rto_megatron.data.readers import read_preferences
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.distributed.checkpoint import open_checkpoint
from tests.data.tokenizers import smollm2, write_hugging_face_folder
from tests.ranks import run_ranks
from tests.stages.chain import run_stage
from tests.stages.test_convert import convert, weights_of


@pytest.fixture(scope="module")
def there_and_back(chain, tmp_path_factory):
    """A folder with the chain's reward model as `hf`, and that brought in again as `run` with the SFT tokenizer."""
    folder = tmp_path_factory.mktemp("scores")
    outward = ConvertRun(source=chain / "reward", out=folder / "hf", parallel=ParallelConfig(tensor=2))
    inward = ConvertRun(
        source=folder / "hf", out=folder / "run", tokenizer=chain / "sft", parallel=ParallelConfig(tensor=2)
    )
    assert run_ranks(convert, 2, outward, inward)[0] == [None, None]
    return folder


def scores_of_transformers(folder, rows):
    """[2 * rows] scores of chosen and rejected responses, as a user of transformers would ask for them: in batches."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sides = [ids for row in rows for ids in (row.prompt_ids + row.chosen_ids, row.prompt_ids + row.rejected_ids)]
    scores = []
    for start in range(0, len(sides), 8):
        batch = tokenizer.pad({"input_ids": sides[start : start + 8]}, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            scores.append(model(**batch).logits.squeeze(-1))
    return torch.cat(scores) + model.config.score_bias


def test_transformers_gives_a_reward_models_scores_for_padded_batches(chain, there_and_back):
    config = json.loads((there_and_back / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "score"}
    rows, _ = read_preferences(
        str(chain / "pairs.jsonl"), load_tokenizer(chain / "tokenizer"), max_length=64, too_long="error"
    )
    scores = scores_of_transformers(there_and_back / "hf", rows).double()
    stored = open_checkpoint(chain / "reward").manifest  # over the same responses, by the live model
    assert stored.score_std > 0.01
    assert scores.mean().item() == pytest.approx(stored.score_mean, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(stored.score_std, abs=1e-5)
    assert (config["score_mean"], config["score_std"]) == (stored.score_mean, stored.score_std)


def evaluate_with(chain, folder, reward):
    run_stage("evaluate", chain, [f"--run_dir={folder}", f"--reward_model={reward}"])


def test_a_reward_model_that_came_back_judges_as_before(chain, there_and_back, tmp_path):
    before, after = open_checkpoint(chain / "reward").manifest, open_checkpoint(there_and_back / "run").manifest
    assert (after.stage, set(after.models)) == ("convert", {"value"})
    assert (after.score_mean, after.score_std) == (before.score_mean, before.score_std)
    assert after.tokenizer == before.tokenizer
    tables = []
    for name, reward in (("own", chain / "reward"), ("back", there_and_back / "run")):
        run_ranks(evaluate_with, 1, chain, tmp_path / name, reward)
        tables.append(json.loads((tmp_path / name / "evaluation.json").read_text())["rows"])
    assert tables[0] == tables[1]
    assert tables[0][0]["score"] != 0


def test_a_policy_is_no_reward_model(chain, tmp_path):
    with pytest.raises(
        AssertionError, match="must be a run of the stage reward, or convert of a reward model, got one"
    ):
        run_ranks(evaluate_with, 1, chain, tmp_path, chain / "sft")


def train_a_critic(chain, folder):
    run_stage("rto", chain, [f"--run_dir={folder}", "--num_steps=1", "--critic_optimizer.lr=0.05"])


def test_a_critic_goes_out_and_comes_back_with_its_bias(chain, tmp_path):
    run_ranks(train_a_critic, 1, chain, tmp_path / "rto")
    out = ConvertRun(
        source=tmp_path / "rto", out=tmp_path / "critic", role="critic", parallel=ParallelConfig(pipeline=2)
    )
    back = ConvertRun(source=tmp_path / "critic", out=tmp_path / "run", parallel=ParallelConfig(pipeline=2))
    again = ConvertRun(source=tmp_path / "run", out=tmp_path / "again", parallel=ParallelConfig(pipeline=2))
    policy = ConvertRun(source=tmp_path / "rto", out=tmp_path / "policy", parallel=ParallelConfig(pipeline=2))
    assert run_ranks(convert, 2, out, back, again, policy)[0] == [None] * 4
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("critic", "again"))
    assert first["score_bias"] == second["score_bias"] != 0
    assert (first["score_mean"], first["score_std"]) == (0.0, 1.0)  # values are normalised by nothing
    before, after = weights_of(tmp_path / "critic"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys() and "score.weight" in before and "lm_head.weight" not in before
    assert all(torch.equal(before[name], after[name]) for name in before)
    written = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]  # a run's policy, unless another role is asked for


def write_classifier(folder, **changes):
    """A Llama with one score and random weights, beside SmolLM2's kind of tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(smollm2(folder))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"num_labels": 1, "pad_token_id": tokenizer.pad_id, **changes}
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **sizes, **settings)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_pairs(path):
    rows = [{"prompt": f"Where is cat {i}?", "chosen": "I am fine. " * (i + 1), "rejected": "No."} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_scores_of_a_reward_model_of_others_are_measured_on_pairs(tmp_path):
    hf, pairs = write_classifier(tmp_path / "hf"), write_pairs(tmp_path / "pairs.jsonl")
    plain = ConvertRun(source=hf, out=tmp_path / "plain")
    measured = ConvertRun(source=hf, out=tmp_path / "measured", score_data=str(pairs))
    assert run_ranks(convert, 2, plain, measured)[0] == [None, None]
    manifest = open_checkpoint(tmp_path / "plain").manifest
    assert (manifest.score_mean, manifest.score_std) == (0.0, 1.0)
    rows, _ = read_preferences(str(pairs), load_tokenizer(hf), max_length=64, too_long="error")
    model = AutoModelForSequenceClassification.from_pretrained(hf)
    with torch.no_grad():
        sides = [side for row in rows for side in (row.prompt_ids + row.chosen_ids, row.prompt_ids + row.rejected_ids)]
        scores = torch.cat([model(torch.tensor([side])).logits[0] for side in sides]).double()
    manifest = open_checkpoint(tmp_path / "measured").manifest
    assert manifest.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert manifest.score_std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)


def test_what_cannot_be_a_reward_model_here_is_refused(chain, tmp_path):
    fills_with_eos = write_classifier(tmp_path / "fills_with_eos", pad_token_id=2)
    two_labels = write_classifier(tmp_path / "two_labels", num_labels=2)
    hf = write_classifier(tmp_path / "hf")
    other = write_hugging_face_folder(
        tmp_path / "other", specials=["<|im_end|>", "<pad>"], eos_token="<|im_end|>", pad_token="<pad>"
    )
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((hf / name).read_bytes())
    out = tmp_path / "out"
    refused = {
        "pad_token_id must not be the tokenizer's EOS, got 2 for both: transformers then": ConvertRun(
            source=fills_with_eos, out=out
        ),
        "num_labels .* must be 1, which is a score, got 2": ConvertRun(source=two_labels, out=out),
        "tokenizer .*/sft: must give the same ids as that of .*/other, which differs on 'It is a truth": ConvertRun(
            source=other, out=out, tokenizer=chain / "sft"
        ),
        r"score_data must be null where a run is written out \(it has its own\), got pairs.jsonl": ConvertRun(
            source=chain / "reward", out=out, score_data="pairs.jsonl"
        ),
        "must hold the role critic to write it out, holds value": ConvertRun(
            source=chain / "reward", out=out, role="critic"
        ),
    }
    for words, message in zip(refused, run_ranks(convert, 1, *refused.values())[0], strict=True):
        assert message and re.search(words, message), f"wanted {words!r}, got {message!r}"
    assert not out.exists()
