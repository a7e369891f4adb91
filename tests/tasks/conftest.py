"""Models that are a tokenizer and nothing else: the generators read no weights."""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Callable, Collection

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from interp.core.places import shipped
from interp.models.model import Model

# A word with the space before it is one token, except "together", which is two: that makes prompts ragged.
WORDS = r" toge|ther| ?[^\W\d_]+|[^\w\s]|\n"
DIGITS = {1: r"|\d| ", 2: r"| ?\d\d| "}


def _corpus() -> str:
    """Every word that a task can use, at the start of a sentence and inside one."""
    fields = []
    for path in sorted((shipped("data") / "tasks").glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            fields += [field for row in csv.reader(file) for field in row]
    fixed = ["\nthe\nThe\nWe year lasted from to capital of is city We went see which in country abc"]
    fixed.append("In fact called homeland")
    fixed += ["Text", "Sentiment", "Article", "Type"]
    # Labels, and the words of the questions, also at the start of a line; colours also as an answer.
    fields += [*string.ascii_uppercase, *(field.title() for field in fields if field.isalpha())]
    fields += re.findall(
        r"\w+|[:?().]", "table desk floor : ? ( ) . On there you see I an and What color Which country home Answer"
    )
    fields += re.findall(r"\w+", "The following are multiple choice questions with answers")
    text = "\n".join(fields + fixed) + " " + " ".join(fields)
    return text + " " + " ".join(f"{n:02d} {n:02d}{n:02d}" for n in range(100))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    """A function that makes a decoder from the words it knows."""

    def make(
        *,
        unknown: Collection[str] = (),
        digits: int = 2,
        bos: bool = False,
        n_ctx: int = 256,
        kind: str = "decoder",
        n_words: int | None = None,
    ) -> Model:
        pattern = WORDS + DIGITS[digits]
        words = sorted(set(re.findall(pattern, _corpus())))
        pieces = [w for w in words if w.strip() not in unknown][:n_words]
        vocab = {piece: i for i, piece in enumerate(["<unk>", "<bos>", "<eos>", *pieces])}
        inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        inner.decoder = decoders.Fuse()
        if bos:
            inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
        )
        return Model(
            bridge=nn.Linear(1, 1), name="words", kind=kind, weights="raw", fingerprint="0" * 64, tokenizer=tokenizer,
            n_layers=1, n_heads=1, n_key_value_heads=1, d_model=1, d_head=1, d_mlp=1, d_vocab=len(vocab), n_ctx=n_ctx,
            gated_mlp=False, causal=True,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def words(make_model: Callable[..., Model]) -> Model:
    """Every word and every two digits are one token; no BOS."""
    return make_model()
