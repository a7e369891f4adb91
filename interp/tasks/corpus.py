"""What text are lenses trained and judged on? Documents of token ids, split whole and packed in windows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.places import cache_folder
from interp.models.model import Model
from interp.tasks import _sampling, _texts
from interp.tasks._prompts import affixes, bare_ids

_Path = str | os.PathLike[str]


class Windows(NamedTuple):
    """Equally long pieces of a corpus, ready for the model, on the CPU.

    `tokens` is `[window pos]`; `document` `[window pos]` is the number of the document that each token is of, within
    the corpus; `fingerprint` is SHA-256 over both; `tokenizer` is that of the corpus, see `Corpus`.
    """

    tokens: Int[Tensor, "window pos"]
    document: Int[Tensor, "window pos"]
    fingerprint: str
    tokenizer: str

    def check(self, model: Model) -> None:
        """Refuse a model whose tokenizer is not the one that made these token ids.

        Args:
            model: that is to read the windows.

        Raises:
            ValueError: another vocabulary.
        """
        _require_same(self.tokenizer, model, "these windows")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents of running text for one model's tokenizer.

    Attributes:
        name: "prose", "files", "hub" or "generated".
        documents: token ids of each document, without special tokens.
        titles: what to call each.
        source: where the text is from, and how much of it was taken.
        tokenizer: SHA-256 of the tokenizer's vocabulary.
        separator: id of the end-of-text token that `windows` puts between two documents, or None.
        prefix: ids with which each window begins: the BOS of a tokenizer that adds one.
    """

    name: str
    documents: tuple[tuple[int, ...], ...]
    titles: tuple[str, ...]
    source: str
    tokenizer: str
    separator: int | None = None
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.documents or len(self.titles) != len(self.documents):
            raise ValueError(
                f"corpus {self.name!r}: {len(self.documents)} documents and {len(self.titles)} titles; it needs at "
                "least one document, and a title for each."
            )
        if empty := [title for title, ids in zip(self.titles, self.documents, strict=True) if not ids]:
            raise ValueError(f"corpus {self.name!r}: document {empty[0]!r} is empty: leave it out.")

    def __len__(self) -> int:
        return len(self.documents)

    def __repr__(self) -> str:
        return f"<Corpus {self.name!r}: {len(self)} documents, {self.n_tokens} tokens; {self.source}>"

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(map(len, self.documents))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the token ids, where each document ends, and the tokenizer: equal for equal text."""
        digest = hashlib.sha256(f"{self.tokenizer}{self.separator}{self.prefix}".encode())
        for ids in self.documents:
            digest.update(f"{len(ids)}:".encode() + np.asarray(ids, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def check(self, model: Model) -> None:
        """Refuse a model whose tokenizer is not the one that made these token ids.

        Args:
            model: that is to read the corpus.

        Raises:
            ValueError: another vocabulary.
        """
        _require_same(self.tokenizer, model, f"corpus {self.name!r}")

    def split(self, shares: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> tuple[Corpus, ...]:
        """Disjoint parts of whole documents, for training, validation and test.

        The documents are shuffled by the seed and cut where the tokens so far come nearest to the shares; no part
        is left empty. Within a part they keep the order of the corpus.

        Args:
            shares: share of the tokens in each part; they add up to 1.
            seed: seed of the shuffle.

        Returns:
            One Corpus a share; together they hold every document once.

        Raises:
            ValueError: shares that are not positive or do not add up to 1, or fewer documents than parts.
        """
        if len(shares) < 2 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares={tuple(shares)}: give two or more positive numbers that add up to 1.")
        if len(self) < len(shares):
            raise ValueError(
                f"corpus {self.name!r} has {len(self)} documents, which are split whole, and {len(shares)} parts were "
                "asked for: give more documents (cut a long file into several), or fewer shares."
            )
        order = np.random.default_rng(seed).permutation(len(self))
        ends = np.cumsum([len(self.documents[i]) for i in order])
        cuts = [0]
        for part, share in enumerate(np.cumsum(shares)[:-1], start=1):
            nearest = 1 + int(np.abs(ends - share * ends[-1]).argmin())
            # At least one document for this part, and one for each that is still to come.
            cuts.append(min(max(nearest, cuts[-1] + 1), len(self) - len(shares) + part))
        cuts.append(len(self))
        return tuple(
            self._some(sorted(order[start:stop].tolist()), f"part {part} of {len(shares)}, seed {seed}")
            for part, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True), start=1)
        )

    def _some(self, rows: Sequence[int], what: str) -> Corpus:
        return replace(
            self,
            documents=tuple(self.documents[i] for i in rows),
            titles=tuple(self.titles[i] for i in rows),
            source=f"{self.source}; {what}: {len(rows)} of {len(self)} documents",
        )

    def windows(self, length: int = 128, *, n_windows: int | None = None) -> Windows:
        """The documents one after the other, cut into windows that are all full; what is left at the end is dropped.

        Between two documents stands the end-of-text token, if the tokenizer has one; it counts to the document that it
        ends. The `prefix` takes the first places of each window and counts to the document of the token after it.

        Args:
            length: tokens in a window; at most the model's context.
            n_windows: how many to keep, evenly spread over the documents; None for all.

        Returns:
            The `Windows`: `[n_tokens // length, length]`, a few more where there are separators.

        Raises:
            ValueError: too few tokens for one window or for `n_windows`, or a length with no room beside the prefix.
        """
        body = length - len(self.prefix)
        if body < 2:
            raise ValueError(
                f"length={length}: a window needs two tokens beside the {len(self.prefix)} special ones at its start."
            )
        after = [] if self.separator is None else [self.separator]
        runs = [np.asarray([*ids, *after]) for ids in self.documents]
        runs[-1] = np.asarray(self.documents[-1])  # between documents only
        owners = np.repeat(np.arange(len(runs)), [len(run) for run in runs])
        n = len(owners) // body
        if not n:
            raise ValueError(
                f"corpus {self.name!r} has {self.n_tokens} tokens in {len(self)} documents, and one window of "
                f"length={length} needs {body}: ask for shorter windows, or give more text."
            )
        kept = n if n_windows is None else n_windows
        if not 1 <= kept <= n:
            raise ValueError(
                f"n_windows={n_windows}, but corpus {self.name!r} has {n} of length={length}: keep 1 to {n}."
            )
        spread = np.arange(kept) * n // kept
        tokens, owners = (row[: n * body].reshape(n, body)[spread] for row in (np.concatenate(runs), owners))
        n = kept
        tokens = np.concatenate([np.tile(np.asarray(self.prefix, dtype=tokens.dtype), (n, 1)), tokens], axis=1)
        owners = np.concatenate([np.repeat(owners[:, :1], len(self.prefix), axis=1), owners], axis=1)
        digest = hashlib.sha256(f"{self.tokenizer}{tokens.shape}".encode())
        for array in (tokens, owners):
            digest.update(array.astype(np.int64).tobytes())
        return Windows(
            torch.from_numpy(tokens).long(), torch.from_numpy(owners).long(), digest.hexdigest(), self.tokenizer
        )


def corpus(
    model: Model,
    *,
    path: _Path | Sequence[_Path] | None = None,
    dataset: str | None = None,
    n_tokens: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Documents of running text, tokenized: Python's own prose, the user's files, or a hub data set.

    Without `path` or `dataset` it is the prose of CPython's language reference, as in `interp.tasks.text`, with one
    document a topic: 20,851 tokens of SmolLM2 in CPython 3.11. A document that repeats an earlier one word for word is
    left out, so that no text stands in two parts of a split.

    Args:
        model: whose tokenizer is used; a decoder.
        path: a UTF-8 text file, several, or a folder whose .txt files (also in folders within it) are read, in the
            order of their names. A file is a document.
        dataset: a data set on the Hugging Face hub that has a column "text", named as in `interp.tasks.text`. A record
            is a document, blank ones are left out. Its test split is read, or else its validation or train split, from
            the start, up to about 40 characters for each of `n_tokens`, from which the documents are chosen.
        n_tokens: how much to take. Documents are taken in an order drawn by the seed until there are so many tokens,
            and the last one is cut there; they keep the order of the source. None takes everything (a data set needs
            a number).
        seed: seed of that choice.

    Returns:
        The `Corpus`.

    Raises:
        ValueError: too little text (with the numbers), an empty file, one that is not UTF-8, a data set without
            `n_tokens`, or a model that is not a decoder of text.
        FileNotFoundError: when `path` is no file, or a folder without .txt files.
        ImportError: when `dataset` needs the `datasets` package.
        ConnectionError: when `dataset` cannot be had.

    Cost: one tokenization of what is taken, about a second for a megabyte.

    Example:
        >>> from interp.models import load
        >>> text = corpus(load("smollm2-135m"), n_tokens=5000)
        >>> text.n_tokens, text.windows(100).tokens.shape
        (5000, torch.Size([50, 100]))
    """
    _require_decoder(model)
    if path is not None and dataset is not None:
        raise ValueError(f"corpus: path={path!r} and dataset={dataset!r} were both given: give one of them.")
    if n_tokens is not None and n_tokens < 1:
        raise ValueError(f"corpus: n_tokens={n_tokens}: give a positive number, or None for everything.")
    name, texts, origin = _read(path, dataset, n_tokens)
    once: dict[str, str] = {}
    for title, text in texts:
        once.setdefault(text, title)
    kept = list(once.items())
    order = range(len(kept)) if n_tokens is None else np.random.default_rng(seed).permutation(len(kept))
    taken: dict[int, list[int]] = {}
    size = 0
    for index in map(int, order):
        ids = bare_ids(model, kept[index][0])
        if ids:  # a text of characters that the tokenizer drops has none
            taken[index] = ids if n_tokens is None else ids[: n_tokens - size]
            size += len(taken[index])
        if size == n_tokens:
            break
    if not taken or size < (n_tokens or 0):
        raise ValueError(
            f"corpus: {origin} has {size} tokens in {len(taken)} documents, and n_tokens={n_tokens} were asked for: "
            "ask for fewer, or give more text with path=."
        )
    share = "all" if n_tokens is None else f"seed {seed}"
    found = Corpus(
        name=name,
        documents=tuple(tuple(taken[i]) for i in sorted(taken)),
        titles=tuple(kept[i][1] for i in sorted(taken)),
        source=f"{origin}; {len(taken)} of {len(texts)} documents, {size} tokens ({share})",
        **_specials(model),
    )
    return replace(found, source=f"{found.source}, sha256 {found.fingerprint[:16]}")


def generated(
    model: Model,
    *,
    n_documents: int = 64,
    length: int = 256,
    temperature: float = 1.0,
    start: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Corpus:
    """Text that the model itself writes: sampled from its own predictions, so that nothing in it is foreign to it.

    Each token is drawn from softmax(logits / temperature), until a special token ends the document or it has `length`
    tokens. The first is never a special one, so no document is empty. A document's randomness is its own, from the seed
    and its number: it does not depend on the batch size, and more documents begin with the same ones.

    The text is kept in the cache folder under the model's fingerprint, its dtype and these options, and read from there
    at the next call. Raw and processed weights share their fingerprint, so on one machine they are given the same text,
    that of whichever came first. Sampled anew, their texts agree up to rounding: a token differs, and with it the rest
    of its document, where the two best candidates are closer than that (about once in 200,000 tokens of SmolLM2,
    estimated from its rounding, 7e-6 logits).

    Args:
        model: a decoder, run without hooks.
        n_documents: how many.
        length: tokens a document has at most; with the start, at most the model's context.
        temperature: above 0; 1 for the model's own distribution, below for likelier and duller text.
        start: a text that each document continues, which is not part of it; None for the tokenizer's BOS (if it adds
            one) or its end-of-text token alone.
        seed: seed of the sampling.
        batch_size: documents at once.

    Returns:
        The `Corpus`: `n_documents` documents, at most `n_documents * length` tokens.

    Raises:
        ValueError: a temperature or numbers out of range, an empty start, or none for a tokenizer with neither BOS nor
            end-of-text token.

    Cost: a pass of one position for each position of each batch, with the keys and values of those before kept
        (`batch_size x length x n_layers x 2 n_key_value_heads d_head` numbers): 130 tokens a second of SmolLM2 on one
        core. A call that was stopped begins anew.

    Example:
        >>> from interp.models import toy
        >>> text = generated(toy.random("llama"), n_documents=3, length=5)
        >>> len(text), text.n_tokens <= 15
        (3, True)
    """
    _require_decoder(model)
    specials = _specials(model)
    own = specials["prefix"] or tuple(i for i in (specials["separator"],) if i is not None)
    before = own if start is None else tuple(model.tokenize(start).ids[0].tolist())
    if not before:
        raise ValueError(
            f"{model.name}'s tokenizer has neither a BOS nor an end-of-text token for a text to begin after: give "
            "its beginning, start=..., or a text of your own, interp.tasks.corpus(model, path=...)."
        )
    if not temperature > 0 or n_documents < 1 or not 1 <= length <= model.n_ctx - len(before):
        raise ValueError(
            f"generated: temperature={temperature}, n_documents={n_documents}, length={length}: give a temperature "
            f"above 0, at least one document, and a length from 1 to {model.n_ctx - len(before)} for {model.name}."
        )
    options = {"n_documents": n_documents, "length": length, "temperature": temperature, "seed": seed}
    kept = {**options, "start": before, "model": model.fingerprint, "dtype": str(model.dtype)}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "generated" / f"{digest}.npz"
    documents = _sampling.load(file)
    if documents is None:
        documents = _sampling.sample(
            model, before, n_documents, length, temperature=temperature, seed=seed, batch_size=batch_size
        )
        _sampling.store(file, documents)
    found = Corpus(
        name="generated",
        documents=tuple(map(tuple, documents)),
        titles=tuple(f"sample {i}" for i in range(n_documents)),
        source=f"sampled from {model.name}, {', '.join(f'{key} {value}' for key, value in options.items())}"
        + ("" if start is None else f", after {start!r}"),
        **specials,
    )
    return replace(found, source=f"{found.source}; {found.n_tokens} tokens, sha256 {found.fingerprint[:16]}")


def _read(
    path: _Path | Sequence[_Path] | None, dataset: str | None, n_tokens: int | None
) -> tuple[str, list[tuple[str, str]], str]:
    """Name, (title, text) of each document, and what to call them in `source`."""
    if dataset is not None:
        if n_tokens is None:
            raise ValueError(f"corpus: dataset={dataset!r} may be of any size: say how much to take, n_tokens=100_000.")
        records, origin = _texts.from_hub(dataset, n_tokens * _texts.CHARACTERS_PER_TOKEN, "corpus")
        texts = [(f"record {i}", text) for i, text in enumerate(records) if text.strip()]
        return "hub", texts, origin
    if path is None:
        topics, origin = _texts.from_python()
        return "prose", list(topics.items()), origin
    files = _files(path)
    texts = [(title, _texts.from_file(file, "corpus")) for title, file in files]
    for title, text in texts:
        if not text.strip():
            raise ValueError(f"corpus: {title} is empty: leave it out, or give a file with text.")
    names = ", ".join(title for title, _ in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return "files", texts, f"files {names}" if len(files) > 1 else f"file {names}"


def _files(path: _Path | Sequence[_Path]) -> list[tuple[str, Path]]:
    """(title, file) of each document."""
    if not isinstance(path, (str, os.PathLike)):
        if not len(path):
            raise ValueError("corpus: path=[] holds no files: give at least one.")
        return [(Path(file).name, Path(file)) for file in path]
    if not Path(path).is_dir():
        return [(Path(path).name, Path(path))]
    found = [(file.relative_to(path).as_posix(), file) for file in sorted(Path(path).rglob("*.txt"))]
    if not found:
        raise FileNotFoundError(f"corpus: the folder {path} has no .txt files: give a folder of text, or the files.")
    return found


def _require_decoder(model: Model) -> None:
    if model.kind != "decoder" or model.tokenizer is None:
        raise ValueError(
            f"a corpus is read token by token, but {model.name} is a {model.kind} model: load a decoder, for example "
            'interp.load("smollm2-135m").'
        )


def _specials(model: Model) -> dict[str, Any]:
    """The fields of a Corpus that depend on the tokenizer alone."""
    return {
        "tokenizer": _vocabulary(model),
        "separator": _end_of_text(model),
        "prefix": tuple(affixes(model, None)[0]),
    }


def _end_of_text(model: Model) -> int | None:
    # A chat model's EOS ends a turn, not a document: what it was pretrained with is still in its vocabulary.
    end = model.tokenizer.get_vocab().get("<|endoftext|>", model.tokenizer.eos_token_id)
    return None if end is None else int(end)


def _vocabulary(model: Model) -> str:
    return hashlib.sha256(json.dumps(model.tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def _require_same(tokenizer: str, model: Model, what: str) -> None:
    if model.tokenizer is None or _vocabulary(model) != tokenizer:
        raise ValueError(
            f"{what} were tokenized with another vocabulary than that of {model.name}, whose token ids mean other "
            "words: make the corpus anew, interp.tasks.corpus(model, ...)."
        )
