from __future__ import annotations

import hashlib
import platform
import sys
import types

import pytest
import torch

from interp.tasks import _texts, text


@pytest.fixture
def story(tmp_path, words):
    """A file of 100 numbers: the fake tokenizer makes one token of each."""
    path = tmp_path / "story.txt"
    path.write_text("".join(f" {n:02d}" for n in range(100)), encoding="utf-8")
    assert len(words.tokenizer(path.read_text())["input_ids"]) == 100
    return path


def numbers(model, task):
    return [[int(t) for t in model.tokenizer.decode(row).split()] for row in task.clean.tolist()]


def test_all_windows_are_the_text_in_its_order(words, story):
    task = text(words, n_prompts=20, length=5, path=story)
    assert sum(numbers(words, task), []) == list(range(100))
    assert task.prompts[1] == " 05 06 07 08 09"
    assert task.positions["end"].tolist() == [4] * 20
    assert (task.corrupt, task.answers, task.wrong, task.mask) == (None, None, None, None)


def test_a_choice_of_windows_keeps_the_order_and_never_overlaps(words, story):
    task = text(words, n_prompts=9, length=7, path=story)
    rows = numbers(words, task)
    assert all(row == list(range(row[0], row[0] + 7)) and row[0] % 7 == 0 for row in rows)
    firsts = [row[0] for row in rows]
    assert firsts == sorted(set(firsts))
    assert text(words, n_prompts=9, length=7, path=story, seed=0).fingerprint == task.fingerprint
    assert len({text(words, n_prompts=9, length=7, path=story, seed=s).fingerprint for s in range(4)}) > 1
    one, other = (sum(numbers(words, part), []) for part in task.split(0))
    assert not set(one) & set(other)
    assert sorted(one + other) == sorted(sum(rows, []))


def test_bos_stands_before_each_window_and_takes_one_place(words, make_model, story):
    for task in (
        text(words, n_prompts=4, length=5, path=story, prepend_bos=True),
        text(make_model(bos=True), n_prompts=4, length=5, path=story),
    ):
        assert task.clean.shape == (4, 5)
        assert task.clean[:, 0].tolist() == [1] * 4
        assert 1 not in task.clean[:, 1:]


def test_source_tells_the_text_by_its_content(words, story):
    task = text(words, n_prompts=3, length=10, path=story)
    digest = hashlib.sha256(story.read_bytes()).hexdigest()[:16]
    assert task.source == f"file story.txt, sha256 {digest}; 3 of 10 windows of 10 tokens"


def test_a_text_that_is_too_short_says_by_how_much(words, story):
    with pytest.raises(ValueError, match="100 tokens, which is 14 windows of 7; n_prompts=15 needs 105 tokens"):
        text(words, n_prompts=15, length=7, path=story)
    empty = story.with_name("empty.txt")
    empty.write_text("")
    with pytest.raises(ValueError, match="0 tokens, which is 0 windows"):
        text(words, n_prompts=1, length=7, path=empty)


def test_refusals(words, make_model, story):
    with pytest.raises(ValueError, match="length=257, but words has a context of 256"):
        text(words, length=257, path=story)
    with pytest.raises(ValueError, match="use a length from 3 to 256"):
        text(words, length=2, path=story, prepend_bos=True)
    with pytest.raises(ValueError, match="n_prompts=0"):
        text(words, n_prompts=0, path=story)
    with pytest.raises(FileNotFoundError, match="nothing.txt is not a file"):
        text(words, path=story.with_name("nothing.txt"))
    with pytest.raises(ValueError, match="both given"):
        text(words, path=story, dataset="wikitext")
    story.write_bytes(b"\xff\xfe\x00 caf\xe9")
    with pytest.raises(ValueError, match="story.txt is not UTF-8 text"):
        text(words, path=story)


TOPIC = """The "pass" statement
********************

   pass_stmt ::= "pass"

"pass" is a null operation, and when it is executed nothing at all
happens.

The *simple* form of this well-
known statement is useful as a placeholder, in the "body" of a loop [1] or
of a class that is still to be written.

   def f(arg): pass    # A function that does nothing (yet)
   Class bodies end here, and this line is longer than twelve words, but code = 1.

object.__new__(cls[, ...])

   Called to create a new instance of a class, which happens before
   the instance is set up.

Changed in version 3.1: The positional argument specifiers can be
omitted for the format method of strings, too.

Short.
"""


def test_prose_is_sentences_without_markup_or_code():
    assert _texts.prose({"pass": TOPIC, "again": TOPIC}) == {
        "again": "The simple form of this well-known statement is useful as a placeholder, in the body of a loop or of "
        "a class that is still to be written.\n\n"
        "Called to create a new instance of a class, which happens before the instance is set up."
    }


def test_the_default_text_is_python_s_own_prose(smol):
    task = text(smol, n_prompts=8, length=64)
    assert f"pydoc_data.topics, Python {platform.python_version()}, sha256" in task.source
    joined = " ".join(task.prompts)
    assert not any(mark in joined for mark in ("::=", ">>>", "***", "```"))
    assert sum(c.isalpha() or c.isspace() for c in joined) / len(joined) > 0.9
    logs = smol(task.clean).log_softmax(-1)[:, :-1]
    loss = -logs.gather(2, task.clean[:, 1:, None]).mean()
    # Measured: perplexity 26 over 64 windows of 128. English that the model can read, and no list of words or numbers.
    assert 5 < torch.exp(loss) < 100


def test_the_default_text_is_long_enough_for_the_defaults(smol):
    first, second = text(smol, n_prompts=128, length=128).split(0)
    assert len(first) == len(second) == 64
    assert not {tuple(row) for row in first.clean.tolist()} & {tuple(row) for row in second.clean.tolist()}


def test_a_python_without_topics_asks_for_a_path(words, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match="without pydoc_data: give a text of your own with path="):
        text(words)


class Hub:
    """Stands in for the `datasets` package: the data sets it knows, and what was read of them."""

    def __init__(self, known, offline=False):
        self.known, self.offline, self.read, self.split = known, offline, 0, None

    def get_dataset_split_names(self, name, config):
        if self.offline:
            raise ConnectionError("Couldn't reach the Hub")
        if name not in {known for known, _ in self.known}:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        if (name, config) not in self.known:
            raise ValueError("Config name is missing.")
        return list(self.known[name, config])

    def load_dataset(self, name, config, *, split, streaming):
        assert streaming
        self.split = split
        for record in self.known[name, config][split]:
            self.read += 1
            yield record


def hub(monkeypatch, known, **options):
    fake = Hub(known, **options)
    stub = types.ModuleType("datasets")
    stub.get_dataset_split_names, stub.load_dataset = fake.get_dataset_split_names, fake.load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return fake


LINES = [{"text": "".join(f" {n:02d}" for n in range(k, k + 10))} for k in range(0, 100, 10)]


@pytest.mark.parametrize(
    ("dataset", "known"),
    [
        ("numbers", ("numbers", None)),
        ("owner/numbers", ("owner/numbers", None)),
        ("wikitext/raw-v1", ("wikitext", "raw-v1")),
        ("owner/wikitext/raw-v1", ("owner/wikitext", "raw-v1")),
    ],
)
def test_hub_names(words, monkeypatch, dataset, known):
    fake = hub(monkeypatch, {known: {"train": [], "test": LINES}})
    task = text(words, n_prompts=10, length=10, dataset=dataset)
    assert fake.split == "test"
    assert f"hub data set {dataset}, test split, sha256" in task.source
    kept = [t for t in words.to_str_tokens(task.clean.flatten()) if t.strip().isdigit()]
    assert [int(t) for t in kept][:20] == list(range(20))


def test_only_the_start_of_a_long_data_set_is_read(words, monkeypatch):
    fake = hub(monkeypatch, {("long", None): {"train": LINES * 1000}})
    text(words, n_prompts=2, length=10, dataset="long")
    assert fake.split == "train"
    assert fake.read == pytest.approx(2 * 10 * 40 / 31, abs=2)  # 40 characters a token, 31 a record


def test_hub_trouble_is_explained(words, monkeypatch):
    hub(monkeypatch, {}, offline=True)
    with pytest.raises(ConnectionError, match=r"'wikitext/raw' could not be had .*Couldn't reach.*needs no network"):
        text(words, dataset="wikitext/raw")
    hub(monkeypatch, {("other", None): {"test": LINES}})
    with pytest.raises(ConnectionError, match="'wikitext' could not be had .*doesn't exist"):
        text(words, dataset="wikitext")
    hub(monkeypatch, {("images", None): {"test": [{"image": "", "label": ""}]}})
    with pytest.raises(ValueError, match="no column 'text', only image, label"):
        text(words, dataset="images")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="needs the datasets package: pip install datasets"):
        text(words, dataset="wikitext")
