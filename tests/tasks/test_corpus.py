from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from interp.models import toy
from interp.tasks import Corpus, _sampling, corpus, generated, text


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


def test_some_windows_are_whole_ones_spread_evenly():
    text = made([25, 31, 8], separator=7)
    every, some = text.windows(6), text.windows(6, n_windows=4)
    assert torch.equal(some.tokens, every.tokens[[0, 2, 5, 8]])  # of 11
    assert torch.equal(some.document, every.document[[0, 2, 5, 8]])
    assert some.fingerprint != every.fingerprint == text.windows(6, n_windows=11).fingerprint
    for n in (0, 12):
        with pytest.raises(ValueError, match="has 11 of length=6: keep 1 to 11"):
            text.windows(6, n_windows=n)


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


# --- text sampled from the model -----------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny():
    return toy.random("llama")


def probabilities(model, ids, temperature=1.0):
    """Of the token after `ids`, by a whole pass without a cache."""
    return (model(torch.tensor([ids]))[0, -1].double() / temperature).softmax(-1)


@pytest.mark.parametrize("architecture", [*toy.ARCHITECTURES, *toy.VARIANTS])
def test_at_low_temperature_it_is_the_models_own_argmax(fresh, architecture):
    model = toy.random(architecture)
    (ids,) = generated(model, n_documents=1, length=20, temperature=1e-9).documents
    so_far = [1]
    for step, token in enumerate(ids):
        logits = model(torch.tensor([so_far]))[0, -1]
        if step == 0:
            logits[:2] = -torch.inf
        assert token == int(logits.argmax())
        so_far.append(token)
    assert len(ids) == 20 or int(model(torch.tensor([so_far]))[0, -1].argmax()) < 2  # the end, by its own argmax


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_have_the_models_probabilities(fresh, tiny, temperature):
    n = 4000
    found = generated(tiny, n_documents=n, length=1, temperature=temperature, batch_size=500)
    seen = np.bincount([ids[0] for ids in found.documents], minlength=64)
    assert seen[:2].sum() == 0
    expected = probabilities(tiny, [1], temperature)[2:].numpy()
    expected, seen = expected / expected.sum(), seen[2:]
    often = expected * n >= 5  # the usual rule for the approximation; the rest is one class
    observed = np.append(seen[often], seen[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * n
    # A right sampler fails this at one seed in a thousand; a temperature or shift that is off, at each.
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3
    other = probabilities(tiny, [1], 3 - temperature)[2:].numpy()
    wrong = np.append(other[often], other[~often].sum()) / other.sum() * n
    assert stats.chisquare(observed[wanted > 0], wrong[wanted > 0]).pvalue < 1e-6


def test_every_position_has_the_models_probabilities(fresh, tiny):
    found = generated(tiny, n_documents=100, length=12, batch_size=32)
    surprise, variance, n_ended = 0.0, 0.0, 0
    for ids in found.documents:
        whole = tiny(torch.tensor([[1, *ids]]))[0].double().log_softmax(-1)
        for position, token in enumerate([*ids, 1][:12]):
            logs = whole[position]
            if position == 0:
                logs = logs[2:].log_softmax(-1)
                score = logs[token - 2]
            else:  # which of the two special tokens ended it is not kept
                logs = torch.cat([logs[:2].logsumexp(0, keepdim=True), logs[2:]])
                score = logs[max(token - 1, 0)]
                n_ended += token == 1
            mean = (logs.exp() * logs).sum()
            surprise += float(score - mean)
            variance += float((logs.exp() * (logs - mean) ** 2).sum())
    # Log-probabilities of what is drawn, less their mean, add up to a martingale: a z-score, beyond 4 once in 16,000.
    assert abs(surprise) / variance**0.5 < 4
    assert n_ended > 5
    assert min(min(ids) for ids in found.documents) > 1


def test_the_text_is_the_same_whatever_the_batches(tiny, tmp_path, monkeypatch):
    made = []
    for size in (1, 7, 30):
        monkeypatch.setenv("INTERP_CACHE", str(tmp_path / str(size)))
        made.append(generated(tiny, n_documents=30, length=10, batch_size=size))
    # Some 200 tokens, whose logits move by 1e-5 between kernels: a difference has odds of 1 in 500.
    assert made[0].documents == made[1].documents == made[2].documents
    more = generated(tiny, n_documents=40, length=10)
    assert more.documents[:30] == made[0].documents
    assert generated(tiny, n_documents=30, length=10, seed=1).documents != made[0].documents
    assert len(set(made[0].documents)) > 25


def test_the_text_is_kept_and_belongs_to_the_model(fresh, tiny, monkeypatch):
    first = generated(tiny, n_documents=4, length=6)
    monkeypatch.setattr(_sampling, "sample", lambda *a, **k: pytest.fail("sampled again"))
    second = generated(tiny, n_documents=4, length=6, batch_size=2)
    assert (first.fingerprint, first.source) == (second.fingerprint, second.source)
    assert generated(toy.random("llama", weights="raw"), n_documents=4, length=6).documents == first.documents
    changes: list[dict[str, Any]] = [{"seed": 1}, {"temperature": 0.9}, {"length": 5}, {"n_documents": 5}]
    for change in [*changes, {"start": "w3 w4"}]:
        with pytest.raises(pytest.fail.Exception, match="sampled again"):
            generated(tiny, **{"n_documents": 4, "length": 6, **change})
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        generated(toy.random("llama", seed=1), n_documents=4, length=6)
    (file,) = (fresh / "generated").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(pytest.fail.Exception, match="sampled again"):  # a damaged file is not read
        generated(tiny, n_documents=4, length=6)


def test_raw_and_processed_weights_write_the_same_text(tiny, tmp_path, monkeypatch):
    texts = []
    for model in (tiny, toy.random("llama", weights="raw")):
        monkeypatch.setenv("INTERP_CACHE", str(tmp_path / model.weights))
        texts.append(generated(model, n_documents=30, length=10).documents)
    assert texts[0] == texts[1]  # sampled twice; the odds are those of other batches


def test_a_model_without_a_cache_of_keys_and_values(fresh, tiny, tmp_path, monkeypatch):
    with_cache = generated(tiny, n_documents=5, length=8)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "other"))

    class Hooked(torch.nn.Module):
        """A bridge that shows no Hugging Face module, as a HookedTransformer does not."""

        def __init__(self, bridge):
            super().__init__()
            self.inner, self.hook_dict = bridge, bridge.hook_dict

        def forward(self, tokens, attention_mask=None):
            return self.inner(tokens)

    slow = dataclasses.replace(tiny, bridge=Hooked(tiny.bridge))
    assert generated(slow, n_documents=5, length=8).documents == with_cache.documents


def test_generated_refusals(fresh, tiny, make_model):
    wrong: list[dict[str, Any]] = [{"temperature": 0.0}, {"n_documents": 0}, {"length": 64}, {"length": 0}]
    for options in wrong:
        with pytest.raises(ValueError, match="a length from 1 to 63 for LlamaForCausalLM"):
            generated(tiny, **options)
    with pytest.raises(ValueError, match="is a encoder model"):
        generated(make_model(kind="encoder"))
    bare = make_model()
    bare.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a BOS nor an end-of-text token .*start="):
        generated(bare)


def test_the_default_model_goes_on_with_a_text(smol, fresh):
    opening = "The history of France is"
    found = generated(smol, n_documents=2, length=30, temperature=0.5, start=opening)
    assert f"length 30, temperature 0.5, seed 0, after {opening!r}; {found.n_tokens} tokens" in found.source
    for ids in found.documents:
        whole = torch.tensor([[*smol.tokenize(opening).ids[0].tolist(), *ids]])
        logs = smol(whole).log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[-len(ids) :]
        # Sampled half-way to greedy: far likelier than the 3.3 nats a token that it gives to the offline prose.
        assert 0 < -float(logs.mean()) < 2
    assert found.documents[0] != found.documents[1]
