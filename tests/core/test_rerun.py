"""Are changed runs exact? The causal cone against whole forward passes with hooks, on every architecture."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import transformer_lens
from torch import Tensor

from interp.core import rerun as engine
from interp.core.edits import Edit
from interp.core.readout import Readout, candidates, readout, some
from interp.core.rerun import rerun
from interp.models import load, program, toy
from interp.models.check import ModelCheckError
from interp.models.hooks import run
from interp.models.model import Model
from interp.tasks import Task

N_PROMPTS, N_POS = 3, 12
#: The prompts share their first five tokens with the source.
SHARED = 5
#: Logits of these toys are about 10; sums in another order differ by 1e-6 a layer.
TOLERANCE = 3e-5
HEADS = {"q": 4, "z": 4, "pattern": 4}
SITES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "post", "mlp_out", "resid_post")


def prompts(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a source that differs from position `SHARED` on, and a mask that pads the first prompt."""
    tokens = toy.random_tokens(model, N_PROMPTS, N_POS)
    source = tokens.clone()
    source[:, SHARED:] = toy.random_tokens(model, N_PROMPTS, N_POS, seed=1)[:, SHARED:]
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    return tokens, source, mask


def reading(model: Model, where: list[int] | None = None) -> Readout:
    """A logit difference, read at a position of each prompt's own."""
    pair = toy.random_tokens(model, N_PROMPTS, 2, seed=5)
    at = torch.tensor(where or [N_POS - 1, N_POS - 1, N_POS - 2])
    return Readout("logit_diff", "logits", at, pair, lambda logits, rows: logits[:, 0] - logits[:, 1])


def supported(model: Model, architecture: str) -> list[str]:
    """Sites whose hooks can be edited: OPT's pattern cannot, and parallel layers have no resid_mid."""
    missing = {"gpt_neox": ("resid_mid",), "phi": ("resid_mid",), "opt": ("pattern",)}.get(architecture, ())
    return [site for site in SITES if site not in missing]


def cells_of(model: Model, site: str) -> list[list[Edit]]:
    """Edits of one site: all and single heads, all and single positions, from the source and constant."""
    heads: list[int | None] = [None]
    if site in HEADS:
        heads += [0, 3]
    elif site in ("k", "v"):
        heads += [model.n_key_value_heads - 1]
    own = torch.tensor([7, 8, -1])
    made = [[Edit(site, layer, head=head, pos=pos)] for layer in range(3) for head in heads for pos in (None, 6, own)]
    made += [[Edit(site, layer, head=heads[-1], pos=pos)] for layer in (0, 2) for pos in (0, N_POS - 1)]
    if site != "pattern":
        made += [[Edit(site, 1, head=heads[-1], pos=pos, value=0.0)] for pos in (None, 3, own)]
    return made


def combined(model: Model) -> list[list[Edit]]:
    """Several edits at once, neurons, and values of every shape."""
    generator = torch.Generator().manual_seed(0)
    by_position = torch.randn(N_PROMPTS, N_POS, model.d_head, generator=generator)
    by_prompt = torch.randn(N_PROMPTS, model.d_head, generator=generator)
    whole = torch.randn(N_PROMPTS, model.d_model, generator=generator)
    neurons = [[Edit("post", layer, neuron=3)] for layer in range(3)]
    return [
        [],
        *neurons,
        [Edit("post", 0, neuron=3, pos=7, value=2.0), Edit("z", 2, head=1), Edit("resid_pre", 2, pos=9)],
        [Edit("z", 1, head=1, value=by_position), Edit("k", 1, head=0, pos=6, value=by_prompt)],
        [Edit("attn_out", 0, pos=torch.tensor([5, 6, 7]), value=whole), Edit("mlp_out", 1, pos=8, value=-whole)],
        [Edit("q", 0, head=2), Edit("v", 0, head=0), Edit("resid_post", 2, pos=11)],
        [Edit("mlp_out", layer) for layer in range(3)] + [Edit("attn_out", layer) for layer in range(3)],
    ]


def scored(model: Model) -> list[list[Edit]]:
    """Attention edges, cut or set."""
    infinite = float("-inf")
    row = torch.zeros(N_PROMPTS, N_POS)
    row[:, 5], row[:, 7] = 0.25, 0.75
    q_pos, k_pos = torch.tensor([9, 10, -1]), torch.tensor([7, -1, 3])
    return [
        [Edit("attn_scores", 1, pos=9, k_pos=5, value=infinite)],
        [Edit("attn_scores", 0, head=2, pos=q_pos, k_pos=k_pos, value=infinite)],
        [Edit("attn_scores", layer, head=1, k_pos=6, pos=8, value=infinite) for layer in range(3)],
        [Edit("pattern", 2, head=2, pos=9, k_pos=5)],
        [Edit("pattern", 1, head=2, pos=11, value=row)],
    ]


def both(model: Model, cells: list[list[Edit]], **options: object) -> tuple[Tensor, Tensor]:
    """The same cells by the cone and by hooks."""
    tokens, source, mask = prompts(model)
    read = reading(model)
    fast = rerun(model, tokens, cells, read, source=source, mask=mask, exact_path="rerun", **options)
    return fast, rerun(model, tokens, cells, read, source=source, mask=mask, exact_path="hooks")


# --- the cone equals whole forward passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES + toy.VARIANTS)
def test_each_site_alone_equals_hooks(architecture: str):
    model = toy.random(architecture)
    for site in supported(model, architecture):
        fast, slow = both(model, cells_of(model, site)[::2])
        assert torch.allclose(fast, slow, atol=TOLERANCE), site
        assert float(slow.std(0).min()) > 1e-3, f"{site} moves nothing, so it tests nothing"


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_edits_together_equal_hooks_in_parts_of_any_size(architecture: str):
    model = toy.random(architecture, weights="raw")
    cells = [cell for site in supported(model, architecture) for cell in cells_of(model, site)[::5]] + combined(model)
    if architecture != "opt":
        cells += scored(model)
    fast, slow = both(model, cells)
    assert torch.allclose(fast, slow, atol=TOLERANCE)
    for room in (1, 50, 300):
        assert torch.allclose(both(model, cells[::3], tokens_at_once=room)[0], slow[::3], atol=TOLERANCE)


@pytest.mark.parametrize("metric", ["log_prob", "prob", "kl"])
def test_metrics_over_the_vocabulary_equal_hooks(metric: str):
    model = toy.random("llama")
    tokens, source, mask = prompts(model)
    answers = toy.random_tokens(model, 1, N_PROMPTS, seed=3)[0]
    task = Task("t", ("a", "b", "c"), tokens, "here", corrupt=source, answers=answers, mask=mask)
    read = readout(model, task, metric)
    cells = [[], *cells_of(model, "z")[::4]]
    fast, slow = (
        rerun(model, tokens, cells, read, source=source, mask=mask, exact_path=path) for path in ("rerun", "hooks")
    )
    assert torch.allclose(fast, slow, atol=TOLERANCE)
    assert float(slow.std(0).min()) > 1e-4


def test_several_numbers_a_prompt():
    model = toy.random("gpt2")
    tokens, source, _ = prompts(model)
    read = candidates(torch.full((N_PROMPTS,), N_POS - 1), toy.random_tokens(model, N_PROMPTS, 4, seed=9))
    cells = [[], [Edit("z", 1, head=0)], [Edit("resid_post", 2)]]
    fast, slow = (rerun(model, tokens, cells, read, source=source, exact_path=path) for path in ("rerun", "hooks"))
    assert fast.shape == (3, N_PROMPTS, 4)
    assert torch.allclose(fast, slow, atol=TOLERANCE)
    assert torch.allclose(fast.sum(-1), torch.zeros(3, N_PROMPTS), atol=TOLERANCE)


def test_the_default_model_equals_hooks(smol: Model):
    task = Task.from_pairs(
        smol,
        "t",
        ["When John and Mary went to the shops, John gave the bag to"],
        ["When John and Mary went to the shops, Mary gave the bag to"],
        [" Mary"],
        [" John"],
    )
    assert task.corrupt is not None
    cells = [[Edit("z", 14, head=4)], [Edit("k", 3, head=1, pos=9)], [Edit("mlp_out", 0)], [Edit("resid_pre", 29)]]
    read = readout(smol, task)
    fast, slow = (
        rerun(smol, task.corrupt, cells, read, source=task.clean, exact_path=path) for path in ("rerun", "hooks")
    )
    # 30 layers of float32 sums; the differences moved are 0.1 to 10 logits.
    assert torch.allclose(fast, slow, atol=5e-4)


def test_bfloat16_stays_near_hooks():
    module = toy.random_module("llama", scale=0.1).to(torch.bfloat16)
    model = load(module, tokenizer=toy.tokenizer(), weights="raw")
    fast, slow = both(model, cells_of(model, "z"))
    # bfloat16 keeps 8 bits: logits of about 1 to a few thousandths, through three layers.
    assert torch.allclose(fast, slow, atol=0.05)


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_patch_everything_is_the_source_and_patch_with_itself_is_nothing(architecture: str):
    model = toy.random(architecture)
    tokens, source, mask = prompts(model)
    read = reading(model)
    everything = [[Edit("resid_pre", layer)] for layer in range(3)]
    whole = rerun(model, tokens, everything, read, source=source, mask=mask)
    target = rerun(model, source, [[]], read, mask=mask)
    assert torch.allclose(whole, target.expand_as(whole), atol=TOLERANCE)
    cells = cells_of(model, "z")[:9]
    itself = rerun(model, tokens, cells, read, source=tokens, mask=mask)
    assert torch.equal(itself, rerun(model, tokens, [[]], read, mask=mask).expand_as(itself))
    assert not torch.allclose(whole, itself[:3], atol=0.1)


def test_positions_before_the_difference_change_nothing_exactly():
    model = toy.random("llama")
    tokens, source, _ = prompts(model)
    cells = [[]] + [[Edit("resid_pre", 1, pos=pos)] for pos in range(SHARED)]
    out = rerun(model, tokens, cells, reading(model), source=source)
    assert torch.equal(out, out[:1].expand_as(out))


def test_an_edit_after_the_position_read_changes_nothing():
    model = toy.random("llama")
    tokens, source, _ = prompts(model)
    read = reading(model, [6, 6, 11])
    out = rerun(model, tokens, [[], [Edit("resid_pre", 0, pos=9)]], read, source=source)
    assert torch.allclose(out[1, :2], out[0, :2], atol=TOLERANCE)
    assert abs(float(out[1, 2] - out[0, 2])) > 1e-2


def test_prompts_one_by_one_equal_the_batch():
    model = toy.random("mistral")
    tokens, source, mask = prompts(model)
    read = reading(model)
    cells = [*cells_of(model, "z")[:6], [Edit("v", 1, head=0, pos=6)]]
    batch = rerun(model, tokens, cells, read, source=source, mask=mask)
    for i in range(N_PROMPTS):
        row = slice(i, i + 1)
        alone = rerun(
            model, tokens[row], [[e] for c in cells for e in c if not isinstance(e.pos, Tensor)], some(read, row),
            source=source[row], mask=mask[row],
        )  # fmt: skip
        kept = [n for n, c in enumerate(cells) if not isinstance(c[0].pos, Tensor)]
        assert torch.allclose(alone[:, 0], batch[kept, i], atol=TOLERANCE)


# --- the cost -------------------------------------------------------------------------------------------------------


def test_only_the_causal_cone_is_computed(monkeypatch: pytest.MonkeyPatch):
    model = toy.random("llama")
    tokens, source, _ = prompts(model)
    steps = program.program(model)
    done = [0, 0, 0]
    inner = program.Program.post

    def counting(self: program.Program, layer: int, stream: Tensor) -> Tensor:
        done[layer] += stream[..., 0].numel()
        return inner(self, layer, stream)

    monkeypatch.setattr(program.Program, "post", counting)
    cells = [[Edit("z", layer, head=head)] for layer in range(3) for head in range(4)]
    rerun(model, tokens, cells, reading(model), source=source)
    tail = N_POS - SHARED
    # Two unchanged passes (the source's goes no further than the last edit), then the rows that have joined.
    passes = 2 * N_PROMPTS * N_POS
    assert done == [passes + 4 * N_PROMPTS * tail, passes + 8 * N_PROMPTS * tail, passes + 12 * N_PROMPTS]
    assert steps is program.program(model)


# --- what it falls back to, and refuses -----------------------------------------------------------------------------


def hooked() -> Model:
    """A HookedTransformer, which has no program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformer_lens.HookedTransformerConfig(
            n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=64, act_fn="relu", d_mlp=32, seed=0
        )
        return load(transformer_lens.HookedTransformer(config), tokenizer=toy.tokenizer())


def test_a_model_without_a_program_runs_with_hooks_and_says_so():
    model = hooked()
    tokens, source, _ = prompts(model)
    cells = [[Edit("z", 1, head=0)], [Edit("resid_mid", 0, pos=7)]]
    with pytest.warns(UserWarning, match="no layer-by-layer program"):
        found = rerun(model, tokens, cells, reading(model), source=source)
    assert torch.equal(found, rerun(model, tokens, cells, reading(model), source=source, exact_path="hooks"))
    with pytest.raises(program.NoProgramError, match="HookedTransformer"):
        rerun(model, tokens, cells, reading(model), source=source, exact_path="rerun")
    # HookedTransformer's own hook_resid_mid is in the stream, so it can be set as any other.
    values = run(model, source, capture=["blocks.0.hook_resid_mid"]).cache["blocks.0.hook_resid_mid"]

    def put(activation: Tensor, hook: object) -> Tensor:
        changed = activation.clone()
        changed[:, 7] = values[:, 7]
        return changed

    plain = reading(model).of(run(model, tokens, hooks=[("blocks.0.hook_resid_mid", put)]).logits)
    assert torch.allclose(found[1], plain, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Edit("reside_pre", 0), "site 'reside_pre' is not known"),
        (Edit("z", 3), "layers 0 to 2"),
        (Edit("z", -1), "layers 0 to 2"),
        (Edit("z", 0, head=4), "heads 0 to 3"),
        (Edit("k", 0, head=2), r"key-value heads \(groups\) 0 to 1"),
        (Edit("resid_pre", 0, head=0), "has no heads"),
        (Edit("z", 0, neuron=0), "neurons are those of site 'post'"),
        (Edit("post", 0, neuron=4096), "neurons are those of site 'post'"),
        (Edit("z", 0, k_pos=2), "leave k_pos out"),
        (Edit("z", 0, pos=12), "12 tokens, 0 to 11"),
        (Edit("z", 0, pos=-1), "12 tokens, 0 to 11"),
        (Edit("z", 0, pos=torch.tensor([1, 2])), "one for each of 3 prompts"),
        (Edit("pattern", 0, pos=2, k_pos=12), "k_pos 12"),
    ],
)
def test_edits_without_a_place_are_refused(edit: Edit, says: str):
    model = toy.random("llama")
    tokens, source, _ = prompts(model)
    with pytest.raises(ValueError, match=says):
        rerun(model, tokens, [[], [edit]], reading(model), source=source)


def test_a_parallel_model_has_no_resid_mid():
    model = toy.random("gpt_neox")
    tokens, source, _ = prompts(model)
    with pytest.raises(ValueError, match="attention and MLP in parallel"):
        rerun(model, tokens, [[Edit("resid_mid", 0)]], reading(model), source=source)


def test_other_bad_input_is_refused():
    model = toy.random("llama")
    tokens, source, _ = prompts(model)
    read = reading(model)
    with pytest.raises(ValueError, match="there are no cells"):
        rerun(model, tokens, [], read)
    with pytest.raises(ValueError, match="aligned token by token"):
        rerun(model, tokens, [[]], read, source=source[:, 1:])
    with pytest.raises(ValueError, match="give source= or value="):
        rerun(model, tokens, [[Edit("z", 0)]], read)
    with pytest.raises(ValueError, match="reads position 12"):
        rerun(model, tokens, [[]], replace(read, where=torch.full((3,), 12)))


def test_free_memory_bounds_what_is_run_together(monkeypatch: pytest.MonkeyPatch):
    model = toy.random("llama")
    tokens, source, mask = prompts(model)
    cells = cells_of(model, "z")
    sizes: list[int] = []
    inner = engine._Sweep._chunk
    monkeypatch.setattr(engine._Sweep, "_chunk", lambda self, part: sizes.append(len(part)) or inner(self, part))
    monkeypatch.setattr(engine, "_free_bytes", lambda device: 0)
    small = rerun(model, tokens, cells, reading(model), source=source, mask=mask)
    assert set(sizes) == {1}
    monkeypatch.undo()
    assert torch.allclose(small, both(model, cells)[1], atol=TOLERANCE)


def test_hooks_that_are_only_shown_are_refused():
    model = toy.random("opt")
    tokens, source, _ = prompts(model)
    with pytest.raises(ModelCheckError, match="does not change the output"):
        rerun(model, tokens, [[Edit("pattern", 1, head=0)]], reading(model), source=source, exact_path="hooks")
    found = rerun(model, tokens, [[], [Edit("pattern", 1, head=0)]], reading(model), source=source)
    assert float((found[1] - found[0]).abs().max()) > 1e-3
