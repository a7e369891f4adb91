"""Lenses in the tuned-lens library's files: its own logits where it can be imported, its layout anywhere; refusals."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from interp.lenses import tuned, tuned_library
from interp.lenses._output import output
from interp.models import toy
from interp.models.hooks import run

#: What version 0.2.0 of the library writes for `toy.random_module("gpt2")`, name of the model left out.
FACTS = {
    "d_model": 32, "num_hidden_layers": 3, "bias": True, "base_model_revision": None,
    "unembed_hash": "b4c7ff4868dffe0a71274ec4fc945ca8d685ffe271c29e867359e7e1da6c8b3a",
    "lens_type": "linear_tuned_lens",
}  # fmt: skip
KEYS = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]

module = cache(toy.random_module)
raw = cache(lambda architecture: toy.random(architecture, weights="raw"))


def translators() -> nn.ModuleList:
    """What the library trains: a linear map with a bias for each layer."""
    generator = torch.Generator().manual_seed(0)
    made = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return made


def by_layout(folder: Path, **changes: object) -> Path:
    """The library's files, written by hand."""
    torch.save(translators().state_dict(), folder / "params.pt")
    config = {"base_model_name_or_path": "toy", **FACTS, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def by_library(folder: Path) -> Path:
    """The library's files, written by itself."""
    from tuned_lens.nn.lenses import TunedLens

    lens = TunedLens.from_model(module("gpt2"))
    lens.layer_translators.load_state_dict(translators().state_dict())
    lens.save(folder)
    return folder


#: The library is no dependency; where it is installed, it takes part.
INSTALLED = importlib.util.find_spec("tuned_lens") is not None


@pytest.mark.parametrize("written", [by_layout, by_library] if INSTALLED else [by_layout])
def test_its_lens_gives_its_logits_here(written, tmp_path):
    model, made = raw("gpt2"), translators()
    lens = tuned_library.read(model, written(tmp_path))
    tokens = toy.random_tokens(model, 2, 7)
    with torch.no_grad():
        hidden = module("gpt2")(tokens, output_hidden_states=True).hidden_states
        for layer in range(3):
            name = f"blocks.{layer}.hook_resid_pre"
            ours = output(model).logits(lens.translate(layer, run(model, tokens, capture=[name]).cache[name]))
            h = hidden[layer]
            theirs = module("gpt2").lm_head(module("gpt2").transformer.ln_f(h + made[layer](h)))
            # Float32: logits of 9, from sums of 32 terms.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert tuned.tuned_lens(model, lens, tokens).meta["lens_meta"]["library_config"]["d_model"] == 32


def test_our_lens_is_its_layout_and_comes_back(tmp_path):
    model = raw("gpt2")
    lens = tuned_library.read(model, by_layout(tmp_path))
    folder = tuned_library.write(lens, model, tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config == {"base_model_name_or_path": model.name, **FACTS}
    state = torch.load(folder / "params.pt", weights_only=True)
    assert list(state) == KEYS
    made = translators().state_dict()
    assert all(torch.equal(state[key], made[key]) for key in KEYS)
    linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    linears.load_state_dict(state)  # as the library does, every key and shape
    if INSTALLED:
        from tuned_lens.nn.lenses import TunedLens

        theirs = TunedLens.from_model_and_pretrained(module("gpt2"), str(folder))
        assert all(torch.equal(theirs.layer_translators.state_dict()[key], made[key]) for key in KEYS)
    back = tuned_library.read(model, folder)
    assert torch.equal(back.weight, lens.weight)
    assert torch.equal(back.bias, lens.bias)
    # A layer that was not trained is the logit lens, in the library too.
    part = tuned.TunedLens((1,), lens.weight[1:2], lens.bias[1:2], model.provenance)
    some = tuned_library.read(model, tuned_library.write(part, model, tmp_path / "part"))
    assert torch.equal(some.weight[1], lens.weight[1])
    assert not some.weight[[0, 2]].any()


def test_the_hash_tells_unembeddings_apart_and_not_their_types():
    of = tuned_library.unembed_hash
    unembed = output(raw("gpt2")).unembed
    assert of(unembed) == FACTS["unembed_hash"]
    assert of(unembed + 0.5) != of(unembed)
    assert of(unembed.T) != of(unembed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unembed_hash": "0" * 64}, "another unembedding than that of GPT2LMHeadModel .hash 000000000000, not b4c7ff"),
        ({"d_model": 64}, "is of toy .d_model 64, 3 layers., not of GPT2LMHeadModel"),
        ({"lens_type": "mlp"}, "is a 'mlp'"),
    ],
)
def test_another_models_lens_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tuned_library.read(raw("gpt2"), by_layout(tmp_path, **changes))


def test_a_lens_without_a_hash_is_known_by_its_sizes(tmp_path):
    lens = tuned_library.read(raw("gpt2"), by_layout(tmp_path, unembed_hash=None))
    assert lens.layers == (0, 1, 2)


class Hostile:
    """What a pickle can do."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_files_that_are_not_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = by_layout(tmp_path)
    model = raw("gpt2")
    torch.save({"0.weight": Hostile()}, folder / "params.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        tuned_library.read(model, folder)
    assert not (tmp_path / "pwned").exists()
    (folder / "params.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        tuned_library.read(model, folder)
    torch.save({key: torch.zeros(2) for key in KEYS}, folder / "params.pt")
    with pytest.raises(ValueError, match=r"has no 0.weight of .32, 32."):
        tuned_library.read(model, folder)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        tuned_library.read(model, tmp_path / "nothing")
    processed = toy.random("gpt2")
    with pytest.raises(ValueError, match='weights="raw"'):
        tuned_library.read(processed, folder)
    with pytest.raises(ValueError, match='weights="raw"'):
        tuned_library.write(tuned.identity(processed), processed, folder)
