from __future__ import annotations

import pytest
import torch

from interp.tasks import induction


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_the_block_comes_twice_and_the_answer_is_what_followed(words, prepend_bos):
    length, bos = 12, int(bool(prepend_bos))
    task = induction(words, 30, length, prepend_bos=prepend_bos)
    assert task.clean.shape == task.corrupt.shape == (30, bos + 2 * length - 1)
    for i in range(30):
        clean, corrupt = (ids[i, bos:].tolist() for ids in (task.clean, task.corrupt))
        if bos:
            assert task.clean[i, 0] == task.corrupt[i, 0] == 1
        answer, wrong = int(task.answers[i]), int(task.wrong[i])
        assert [*clean, answer] == clean[:length] * 2
        assert len(set(clean)) == length, "no token has two continuations"
        assert corrupt[length:] == clean[length:]
        assert not set(corrupt[:length]) & {*clean, answer}, "nothing to copy"
        assert len(set(corrupt[:length])) == length
        assert wrong in clean[: length - 2]
        assert not {0, 1, 2} & {*clean, *corrupt}, "special tokens"
        where = {name: int(position[i]) for name, position in task.positions.items()}
        assert where["end"] == len(clean) + bos - 1
        assert task.clean[i, where["source"]] == answer
        assert task.clean[i, where["source"] - 1] == task.clean[i, where["end"]]
        assert task.clean[i, where["repeat"]] == task.clean[i, bos]
        assert where["repeat"] == bos + length
    assert task.prompts[0] == words.tokenizer.decode(task.clean[0].tolist())


def test_seeds_and_the_whole_vocabulary(words, make_model):
    assert induction(words, 4, 8, seed=1).fingerprint == induction(words, 4, 8, seed=1).fingerprint
    assert induction(words, 4, 8, seed=1).fingerprint != induction(words, 4, 8, seed=2).fingerprint
    small = make_model(n_words=10)
    task = induction(small, 200, 5)
    assert set(torch.cat([task.clean, task.corrupt], 1).unique().tolist()) == set(range(3, 13))
    assert "10 of 13 ids" in task.source


def test_refusals_say_what_fits(make_model, words):
    with pytest.raises(ValueError, match="length=6 needs 12 different tokens .* has 10 .* at most 5"):
        induction(make_model(n_words=10), 4, 6)
    with pytest.raises(ValueError, match="prompts of 257 tokens; .* context of 256: use one from 3 to 128"):
        induction(words, 4, 129)
    assert induction(words, 1, 128).clean.shape[1] == 255
    with pytest.raises(ValueError, match="prompts of 257 tokens; .* use one from 3 to 128"):
        induction(words, 4, 128 + 1)
    with pytest.raises(ValueError, match="at least 3"):
        induction(words, 4, 2)
    with pytest.raises(ValueError, match="n_prompts=0"):
        induction(words, 0)
    with pytest.raises(ValueError, match="the induction task asks for the next token"):
        induction(make_model(kind="encoder"))


def test_the_default_model_copies(smol):
    task = induction(smol, 12, 30)
    p = {name: smol(ids)[:, -1].log_softmax(-1) for name, ids in (("clean", task.clean), ("corrupt", task.corrupt))}
    answer = {name: logs.gather(1, task.answers[:, None])[:, 0] for name, logs in p.items()}
    # Measured: the answer beats the wrong one on every prompt; its log-probability is -3 nats, and -14 without a copy.
    assert (answer["clean"] > p["clean"].gather(1, task.wrong[:, None])[:, 0]).float().mean() >= 0.8
    assert (answer["clean"] - answer["corrupt"]).mean() > 5
