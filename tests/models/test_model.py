"""Does text become the tokens that the model reads, and back?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.models import Model, toy
from interp.models.vision import load_vision, toy_vit


@pytest.fixture(scope="module")
def model() -> Model:
    return toy.random("llama")


def test_a_ragged_batch_is_padded_on_the_side_asked_for(model: Model) -> None:
    ids, mask = model.tokenize(["w5 w6 w7", "w8"])
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = model.tokenize(["w5 w6 w7", "w8"], padding_side="right")
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert model.tokenize("w9").ids.tolist() == [[9]]


def test_bos_is_said_not_guessed(model: Model, smol: Model) -> None:
    assert model.tokenize("w5", prepend_bos=True).ids.tolist() == [[0, 5]]
    assert model.tokenize("w5", prepend_bos=False).ids.tolist() == [[5]]
    text = "Paris is"
    assert smol.tokenize(text).ids.tolist() == smol.tokenize(text, prepend_bos=False).ids.tolist()
    with_bos = smol.tokenize(text, prepend_bos=True).ids[0].tolist()
    assert with_bos == [smol.tokenizer.bos_token_id, *smol.tokenize(text).ids[0].tolist()]
    without = toy.tokenizer()
    without.bos_token = None
    with pytest.raises(ValueError, match="tokenizer has no BOS token: call with prepend_bos=False"):
        replace(model, tokenizer=without).tokenize("w5", prepend_bos=True)


@pytest.mark.parametrize(
    ("prompts", "complaint"),
    [
        ([], "no prompts were given: pass one text or a list of at least one"),
        ("", "prompt 0 is empty: '' has no tokens"),
        (["w5", ""], "prompt 1 is empty"),
        (["w5", "   "], "prompt 1 is empty: '   ' has no tokens"),
        (["w5", "w5 " * 65], r"prompt 1 has 65 tokens, but .* has a context of 64: shorten it, or .*length=64"),
    ],
)
def test_prompts_that_cannot_be_read(prompts: str | list[str], complaint: str, model: Model) -> None:
    with pytest.raises(ValueError, match=complaint):
        model.tokenize(prompts)


def test_bos_counts_towards_the_context(model: Model) -> None:
    assert model.tokenize("w5 " * 64).ids.shape == (1, 64)
    with pytest.raises(ValueError, match="prompt 0 has 65 tokens"):
        model.tokenize("w5 " * 64, prepend_bos=True)


def test_padding_is_the_tokenizers_else_its_end_of_text_else_zero(model: Model) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.pad_token = "w7"
    assert replace(model, tokenizer=tokenizer).pad_token == 7
    tokenizer.pad_token = None
    assert replace(model, tokenizer=tokenizer).pad_token == 1
    tokenizer.eos_token = None
    assert replace(model, tokenizer=tokenizer).pad_token == 0


def test_single_tokens_and_their_text(model: Model, smol: Model) -> None:
    assert model.single_token("w12") == 12
    paris = smol.single_token(" Paris")
    assert smol.to_str_tokens([paris]) == [" Paris"]
    with pytest.raises(ValueError, match=r"' Ouagadougou' is \d tokens for smollm2-135m: \[' .*leading space"):
        smol.single_token(" Ouagadougou")
    with pytest.raises(ValueError, match=r"'' is 0 tokens"):
        model.single_token("")
    assert smol.to_str_tokens(smol.tokenize("a  b\n").ids[0]) == ["a", " ", " b", "\n"]


def test_what_a_model_says_of_itself(model: Model) -> None:
    text = repr(model)
    for part in ("decoder", "3 layers x 4 heads (2 KV)", "d_model 32", "processed weights", "float32, cpu"):
        assert part in text
    assert model.fingerprint[:12] in text
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_a_hook_point_by_name(model: Model) -> None:
    assert model.hook_point("blocks.2.hook_resid_post") is model.bridge.hook_dict["blocks.2.hook_resid_post"]
    with pytest.raises(ValueError, match=r"has no hook 'blocks.2.hook_resid'. Nearest: .* List them with sorted"):
        model.hook_point("blocks.2.hook_resid")


def test_a_model_of_images_has_no_tokenizer() -> None:
    seeing = load_vision(toy_vit(), "toy-vit", fingerprint="f" * 64)
    with pytest.raises(ValueError, match="toy-vit is a vision model without a tokenizer: pass its inputs as a tensor"):
        seeing.tokenize("w5")
