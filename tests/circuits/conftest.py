"""Multiple choice on models without training: random ones, and one in which every class of head is planted."""

from __future__ import annotations

import pytest
import torch

from interp.models import toy
from interp.models._planted_build import BOS, END, WORDS, blank, copier, finish, head
from interp.tasks.task import Task

#: "<bos> asked  label content  label content  label content  label content  END"
LABELS, CONTENTS, LAST = [2, 4, 6, 8], [3, 5, 7, 9], 10
N_LETTERS = N_CONTENTS = 6


def places(n):
    named = {f"label_{i}": torch.full((n,), at) for i, at in enumerate(LABELS)}
    named |= {f"content_{i}": torch.full((n,), at) for i, at in enumerate(CONTENTS)}
    return named | {"end": torch.full((n,), LAST)}


@pytest.fixture(scope="session")
def random_choice():
    """A random model, and a task of random tokens; with `padded`, every second prompt is two tokens shorter."""

    def make(architecture="llama", *, n=8, padded=False, weights="processed"):
        model = toy.random(architecture, weights=weights)
        tokens = toy.random_tokens(model, n, LAST + 1)
        options = tokens[:, LABELS]
        for row, ids in enumerate(options):  # four different labels
            for i in range(4):
                while ids[i] in ids[:i]:
                    ids[i] = 2 + (ids[i] - 1) % 60
            tokens[row, LABELS] = ids
        named, mask = places(n), None
        if padded:
            tokens = torch.cat([torch.ones(n, 2, dtype=torch.long), tokens], 1)
            named = {name: at + 2 for name, at in named.items()}
            mask = torch.ones_like(tokens)
            mask[::2, :2] = 0
        right = torch.arange(n) % 4
        answers = options[torch.arange(n), right]
        prompts = tuple(f"prompt {i}" for i in range(n))
        task = Task(
            "random", prompts, tokens, "random tokens", answers=answers, options=options, positions=named, mask=mask
        )
        return model, task

    return make


@pytest.fixture(scope="session")
def planted_choice():
    """The model with the planted classes, and its task.

    Layer 0: head 0 moves the content asked for to the end, head 1 each label to its content. Layer 1 head 0 finds that
    content among the options and writes where it stands (or, with keys="identity", which label it has). Layer 2:
    head 0 is the correct-letter head, head 1 the same for the first letter only, head 2 raises all labels evenly, head
    3 always raises the second. Layer 3 head 0 doubles what is written.
    """

    def make(keys="index"):
        sizes = {"asked": N_CONTENTS, "place": 12, "mine": N_LETTERS, "out": N_LETTERS}
        build = blank(4, 4, n_words=N_LETTERS + N_CONTENTS, **sizes)
        letters, contents = build.words[:N_LETTERS], build.words[N_LETTERS:]
        pos, one, place, out = build["pos"], build["one"], build["place"], build["out"]
        head(build, (0, 0), asks=build.end, want=one, offer=pos[1:2], value=contents, write=build["asked"])
        head(build, (0, 1), asks=pos[CONTENTS].sum(0, keepdim=True), want=pos[CONTENTS], offer=pos[LABELS],
             value=letters, write=build["mine"])  # fmt: skip
        by_index = keys == "index"
        found = (pos[CONTENTS], place[CONTENTS]) if by_index else (build["mine"], place[:N_LETTERS])
        head(build, (1, 0), asks=build.end, want=build["asked"], offer=contents, value=found[0], write=found[1],
             bar=(build.end, pos[1:2]))  # fmt: skip
        want, offer = (place[CONTENTS], pos[LABELS]) if by_index else (place[:N_LETTERS], letters)
        head(build, (2, 0), asks=build.end, want=want, offer=offer, value=letters, write=out)
        head(build, (2, 1), asks=build.end, want=want[:1], offer=offer[:1], value=letters, write=out)
        head(build, (2, 2), asks=build.end, want=one.expand(4, -1), offer=pos[LABELS], value=letters, write=out)
        copier(build, (2, 3), value=one, write=0.5 * out[1:2])
        head(build, (3, 0), asks=build.end, want=one, offer=build["tok"][END : END + 1], value=out, write=out)
        return finish(build, out=out, scale=2.0)

    return make


@pytest.fixture(scope="session")
def planted_task():
    """Prompts of the planted model: labels A to D, or any four letters in any order."""

    def make(n=24, *, labels="letters", seed=0):
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.stack([torch.randperm(N_LETTERS, generator=generator)[:4] for _ in range(n)])
        marks = WORDS + (torch.arange(4).expand(n, -1) if labels == "letters" else shuffled)
        contents = torch.stack([torch.randperm(N_CONTENTS, generator=generator)[:4] for _ in range(n)])
        contents = WORDS + N_LETTERS + contents
        row, right = torch.arange(n), torch.arange(n) % 4
        tokens = torch.full((n, LAST + 1), END)
        tokens[:, 0], tokens[:, 1] = BOS, contents[row, right]
        tokens[:, LABELS], tokens[:, CONTENTS] = marks, contents
        prompts = tuple(f"prompt {i}" for i in range(n))
        return Task(
            "planted", prompts, tokens, "by hand", answers=marks[row, right], options=marks, positions=places(n)
        )

    return make
