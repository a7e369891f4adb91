from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.models import toy
from interp.tasks import Corpus, corpus, text


def made(lengths, *, separator=None, prefix=()):
    """A corpus whose tokens are all different: 100, 101, ..."""
    starts = 100 + np.cumsum([0, *lengths])
    documents = tuple(tuple(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True))
    titles = tuple(f"d{i}" for i in range(len(lengths)))
    return Corpus("made", documents, titles, "here", "0" * 64, separator=separator, prefix=prefix)


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths=LENGTHS, length=st.integers(4, 20), prefix=st.sampled_from([(), (1,)]))
def test_windows_tile_the_documents_once_and_in_order(lengths, length, prefix):
    text = made(lengths, separator=7, prefix=prefix)
    flat = [(i, number) for number, ids in enumerate(text.documents) for i in (*ids, 7)][:-1]
    body = length - len(prefix)
    if len(flat) < body:
        with pytest.raises(ValueError, match=f"{text.n_tokens} tokens .* length={length} needs {body}"):
            text.windows(length)
        return
    windows = text.windows(length)
    assert windows.tokens.shape == windows.document.shape == (len(flat) // body, length)
    assert all(tuple(row[: len(prefix)]) == prefix for row in windows.tokens.tolist())
    inside, owner = windows.tokens[:, len(prefix) :].flatten(), windows.document[:, len(prefix) :].flatten()
    assert list(zip(inside.tolist(), owner.tolist(), strict=True)) == flat[: len(flat) // body * body]
    assert bool((windows.document[:, : len(prefix)] == windows.document[:, len(prefix) : len(prefix) + 1]).all())


@given(lengths=st.lists(st.integers(1, 50), min_size=3, max_size=20), seed=st.integers(0, 5))
def test_a_split_is_disjoint_complete_and_near_the_shares(lengths, seed):
    whole, shares = made(lengths), (0.6, 0.3, 0.1)
    parts = whole.split(shares, seed)
    titles = [title for part in parts for title in part.titles]
    assert sorted(titles) == sorted(whole.titles)
    named = dict(zip(whole.titles, whole.documents, strict=True))
    assert all(named[t] == ids for part in parts for t, ids in zip(part.titles, part.documents, strict=True))
    assert [list(part.titles) == sorted(part.titles, key=lambda t: int(t[1:])) for part in parts] == [True] * 3
    # Each of the two cuts is off by at most half a document, or by the documents kept so that no part is empty.
    for part, share in zip(parts, shares, strict=True):
        assert abs(part.n_tokens - share * whole.n_tokens) <= 3 * max(lengths)


def test_the_cuts_are_the_nearest_ones():
    sizes = sorted(part.n_tokens for part in made([10] * 10).split((0.7, 0.2, 0.1)))
    assert sizes == [10, 20, 70]
    assert len({made([10] * 10).split(seed=seed)[0].titles for seed in range(3)}) > 1
    assert made([10] * 10).split(seed=3)[0].titles == made([10] * 10).split(seed=3)[0].titles
    first, second = made([1000, 1]).split((0.01, 0.99))
    assert {first.n_tokens, second.n_tokens} == {1000, 1}  # neither is empty, whatever the shares


def test_split_refusals():
    with pytest.raises(ValueError, match="2 documents, which are split whole, and 3 parts"):
        made([5, 5]).split()
    for shares in ((0.5, 0.4), (1.0,), (1.5, -0.5)):
        with pytest.raises(ValueError, match="positive numbers that add up to 1"):
            made([5, 5, 5]).split(shares)


def test_a_corpus_without_documents_or_with_an_empty_one():
    with pytest.raises(ValueError, match="0 documents and 0 titles"):
        made([])
    with pytest.raises(ValueError, match="document 'd1' is empty"):
        made([3, 0, 2])
    with pytest.raises(ValueError, match="length=2: a window needs two tokens beside the 1 special"):
        made([9], prefix=(1,)).windows(2)


def test_equal_text_has_an_equal_fingerprint_and_other_text_another(words, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.txt").write_text(" 01 02 03")
    one, two = (corpus(words, path=tmp_path / folder) for folder in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert one.windows(3).fingerprint == two.windows(3).fingerprint != one.windows(2).fingerprint
    others = [made([3, 2]), made([2, 3]), made([5]), made([3, 2], separator=1), made([3, 2], prefix=(1,))]
    assert len({other.fingerprint for other in others}) == len(others)
    (tmp_path / "two" / "two.txt").write_text(" 01 02 04")
    assert corpus(words, path=tmp_path / "two").fingerprint != one.fingerprint


@pytest.fixture
def folder(tmp_path):
    """Three documents of 10 numbers each, one of them in a folder within, and a file of another kind."""
    (tmp_path / "more").mkdir()
    for start, name in ((0, "a.txt"), (10, "b.txt"), (20, "more/c.txt")):
        (tmp_path / name).write_text("".join(f" {n:02d}" for n in range(start, start + 10)), encoding="utf-8")
    (tmp_path / "notes.md").write_text("not this")
    return tmp_path


def numbers(model, ids):
    return [int(t) for t in model.tokenizer.decode(ids).split()]


def test_files_and_folders(words, folder):
    for path in (folder, str(folder), [folder / "a.txt", folder / "b.txt", str(folder / "more" / "c.txt")]):
        found = corpus(words, path=path)
        assert [numbers(words, ids) for ids in found.documents] == [list(range(k, k + 10)) for k in (0, 10, 20)]
    assert corpus(words, path=folder).titles == ("a.txt", "b.txt", "more/c.txt")
    single = corpus(words, path=folder / "b.txt")
    assert (single.name, single.titles, single.n_tokens) == ("files", ("b.txt",), 10)
    assert f"file b.txt; 1 of 1 documents, 10 tokens (all), sha256 {single.fingerprint[:16]}" == single.source
    assert single.separator == words.tokenizer.eos_token_id


def test_n_tokens_takes_whole_documents_and_cuts_the_last(words, folder):
    drawn = [corpus(words, path=folder, n_tokens=15, seed=seed) for seed in range(8)]
    for found in drawn:
        assert found.n_tokens == 15
        assert sorted(map(len, found.documents)) == [5, 10]
        assert list(found.titles) == sorted(found.titles)
        for ids in found.documents:  # the start of a document
            assert numbers(words, ids)[0] % 10 == 0
    assert len({found.titles for found in drawn}) == 3
    assert corpus(words, path=folder, n_tokens=15, seed=3).fingerprint == drawn[3].fingerprint
    with pytest.raises(ValueError, match="30 tokens in 3 documents, and n_tokens=31"):
        corpus(words, path=folder, n_tokens=31)


def test_a_repeated_document_is_taken_once(words, folder):
    (folder / "d.txt").write_text((folder / "a.txt").read_text())
    found = corpus(words, path=folder)
    assert found.titles == ("a.txt", "b.txt", "more/c.txt")
    assert "3 of 4 documents" in found.source


def test_a_tokenizer_that_adds_bos_begins_each_window_with_it(make_model, folder):
    found = corpus(make_model(bos=True), path=folder)
    assert found.prefix == (1,)
    assert 1 not in sum(found.documents, ())
    assert found.windows(8).tokens[:, 0].tolist() == [1] * 4


def test_bad_files(words, folder):
    with pytest.raises(FileNotFoundError, match="nothing.txt is not a file"):
        corpus(words, path=folder / "nothing.txt")
    with pytest.raises(ValueError, match="holds no files"):
        corpus(words, path=[])
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no \.txt files"):
        corpus(words, path=folder / "empty")
    (folder / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match="b.txt is empty"):
        corpus(words, path=folder)
    (folder / "b.txt").write_bytes(b"\xff\xfe caf\xe9")
    with pytest.raises(ValueError, match="b.txt is not UTF-8 text"):
        corpus(words, path=folder)
    with pytest.raises(ValueError, match="both given"):
        corpus(words, path=folder, dataset="wikitext")
    with pytest.raises(ValueError, match="n_tokens=0"):
        corpus(words, path=folder, n_tokens=0)


def test_only_decoders(make_model):
    with pytest.raises(ValueError, match="words is a encoder model: load a decoder"):
        corpus(make_model(kind="encoder"))


def test_another_tokenizer_is_refused(words, make_model, folder):
    found = corpus(words, path=folder)
    for part in (found, found.windows(5)):
        part.check(words)
        with pytest.raises(ValueError, match="tokenized with another vocabulary than that of words"):
            part.check(make_model(n_words=50))


def hub(monkeypatch, records):
    """Stands in for the `datasets` package."""
    stub, read = types.ModuleType("datasets"), []

    def load_dataset(name, config, *, split, streaming):
        for record in records:
            read.append(record)
            yield record

    stub.get_dataset_split_names, stub.load_dataset = lambda name, config: ["test"], load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return read


def test_each_record_of_a_data_set_is_a_document(words, monkeypatch):
    lines = [{"text": "".join(f" {n:02d}" for n in range(k, k + 5))} for k in range(0, 50, 5)]
    blank = [{"text": ""}, {"text": " \n"}]
    read = hub(monkeypatch, lines[:5] + blank + lines[5:] + lines * 100)
    found = corpus(words, dataset="numbers", n_tokens=40)
    assert found.n_tokens == 40
    assert all(ids[-1] == words.tokenizer.get_vocab()["\n"] for ids in found.documents[:-1])
    assert len(set(found.titles)) == len(found) and "record 5" not in found.titles
    assert "hub data set numbers, test split; " in found.source
    assert len(read) == pytest.approx(40 * 40 / 16, abs=3)  # 40 characters a token, 16 a record: not the whole of it
    with pytest.raises(ValueError, match="say how much to take"):
        corpus(words, dataset="numbers")
    hub(monkeypatch, lines)
    with pytest.raises(ValueError, match="60 tokens in 10 documents, and n_tokens=61"):
        corpus(words, dataset="numbers", n_tokens=61)


def test_the_default_text_is_that_of_the_text_task(smol):
    found = corpus(smol)
    assert found.name == "prose" and len(found) > 40 and 15_000 < found.n_tokens < 40_000
    # The same prose, cut into windows by the task without regard to documents.
    flat = " ".join(smol.tokenizer.decode(ids) for ids in found.documents)
    task = text(smol, n_prompts=5, length=40)
    assert all(" ".join(prompt.split()[1:-1]) in " ".join(flat.split()) for prompt in task.prompts)
    train, validation, test = found.split()
    assert abs(train.n_tokens / found.n_tokens - 0.8) < 0.05
    assert validation.n_tokens and test.n_tokens
    assert found.separator == 0  # <|endoftext|>, which the model was pretrained with, and not the chat's end of turn
    found.check(smol)
    with pytest.raises(ValueError, match="another vocabulary"):
        found.check(toy.random())
