"""Sources that the `datasets` library opens: parquet and JSON files, folders by split, and what it cannot find."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rto_megatron.data.readers import read_prompts, read_sft
from rto_megatron.errors import DataError
from tests.data.tokenizers import ours

ROWS = [{"prompt": "one", "response": "a"}, {"prompt": "two", "response": "b"}]


@pytest.fixture(scope="module")
def tokenizer():
    return ours()


@pytest.fixture(autouse=True)
def cache_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)


def texts(source, tokenizer):
    return [row.text for row in read_prompts(str(source), tokenizer, max_prompt_tokens=99, too_long="error")[0]]


def test_a_parquet_file(tokenizer, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet", tokenizer) == ["one", "two"]


def test_a_json_file_holds_a_list(tokenizer, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert texts(tmp_path / "rows.json", tokenizer) == ["one", "two"]


def test_a_folder_by_split(tokenizer, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), folder / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[1:]), folder / "test-00000-of-00001.parquet")
    assert (texts(folder, tokenizer), texts(f"{folder}:test", tokenizer)) == (["one"], ["two"])
    with pytest.raises(DataError, match=r"set:nothing': .*Unknown split \"nothing\""):
        texts(f"{folder}:nothing", tokenizer)


def test_columns_that_a_row_lacks_do_not_count(tokenizer, tmp_path):
    rows = [{**ROWS[0], "messages": None}, {"messages": [{"role": "user", "content": "hi"}], "response": "x"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert len(read_sft(str(tmp_path / "rows.json"), tokenizer, max_length=99, too_long="error")[0]) == 2


def test_a_bad_row_names_source_and_row(tokenizer, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, {"prompt": ""}]))
    with pytest.raises(DataError, match=r"rows\.json row 2: needs a non-empty 'prompt'"):
        texts(tmp_path / "rows.json", tokenizer)


def test_a_name_that_nobody_knows(tokenizer):
    with pytest.raises(DataError, match=r"data source 'no/such_set:train': must be a \.jsonl file, .*library says: "):
        texts("no/such_set:train", tokenizer)


BROKEN_FILES = {
    "half.json": ('[{"prompt": "one"}, {"prompt": ', "Expected object or value"),
    "open.csv": ('hi,"a', "Error tokenizing data. C error: EOF inside string starting at row 0"),
    "text.parquet": ("hello " * 9, "Parquet magic bytes not found in footer"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named_with_what_breaks_it(name, tokenizer, tmp_path):
    text, reason = BROKEN_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}': must be .*library says: .*{reason}") as caught:
        texts(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.fixture
def asked(monkeypatch):
    """Every (name, split) that the library is asked for; it answers with ROWS."""
    names = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, data_files, split: names.append((name, split)) or list(ROWS)
    )
    return names


NO_PATHS = ("data/prefs_trian", "data/prefs_trian:test", "./prefs", "../prefs", "/no/prefs", "~/no_prefs")
NO_PATHS += ("dta/sub/prefs", "prefs.jsonl:train", "dta/prefs.json:train")


@pytest.mark.parametrize("name", NO_PATHS)
def test_a_mistyped_path_is_not_looked_for_on_the_hub(name, asked, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=f"{name.lstrip('.~/')}: there is no such data file or folder; paths are rel"):
        texts(name, tokenizer)
    assert asked == []


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl:train"])
def test_a_file_that_is_no_data_file_or_has_a_split_is_not_either(name, asked, tokenizer, tmp_path):
    (tmp_path / name.partition(":")[0]).write_text("")
    with pytest.raises(DataError, match=rf"{name}: a data file must be named by its path alone and end .* \.jsonl, "):
        texts(tmp_path / name, tokenizer)
    assert asked == []


@pytest.mark.parametrize("name", ["imdb", "org/name", "org/name:test", "org/name.v2:test"])
def test_a_name_of_the_hub_goes_to_the_library(name, asked, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert texts(name, tokenizer) == ["one", "two"]
    assert asked == [(name.partition(":")[0], "test" if ":" in name else "train")]


def test_home_is_expanded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert texts("~/rows.json", tokenizer) == ["one", "two"]
