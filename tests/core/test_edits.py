"""Does one indexed assignment make the edits that a loop would?"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.core.edits import Edit, apply, reach, sites_of

ROWS, PROMPTS, N_POS, HEADS, WIDTH = 3, 2, 5, 4, 3
SOURCE = {
    ("z", 0): torch.randn(PROMPTS, N_POS, HEADS, WIDTH, generator=torch.Generator().manual_seed(1)),
    ("pattern", 0): torch.randn(PROMPTS, HEADS, N_POS, N_POS, generator=torch.Generator().manual_seed(2)),
    ("post", 0): torch.randn(PROMPTS, N_POS, HEADS, generator=torch.Generator().manual_seed(3)),
}

positions = st.one_of(
    st.none(),
    st.integers(0, N_POS - 1),
    st.lists(st.integers(-1, N_POS - 1), min_size=PROMPTS, max_size=PROMPTS).map(torch.tensor),
)
heads = st.one_of(st.none(), st.integers(0, HEADS - 1))
values = st.one_of(st.none(), st.floats(-9, 9, width=32))


def at(where: int | Tensor | None, prompt: int, position: int) -> bool:
    """Whether an edit given that way is made at a position of a prompt."""
    if where is None:
        return True
    return position == (int(where[prompt]) if isinstance(where, Tensor) else where)


def by_loop(site: str, edits: list[tuple[int, Edit]], state: Tensor, view: Tensor) -> Tensor:
    """The same, one number at a time."""
    out = state.clone()
    for row, edit in edits:
        for b in range(PROMPTS):
            for i, position in enumerate(view[b].tolist()):
                if not at(edit.pos, b, position):
                    continue
                for h in range(HEADS):
                    if edit.head not in (None, h) or edit.neuron not in (None, h):
                        continue
                    if site in ("post", "z"):
                        out[row, b, i, h] = SOURCE[site, 0][b, position, h] if edit.value is None else edit.value
                    else:
                        for k in range(N_POS):
                            if at(edit.k_pos, b, k):
                                new = SOURCE[site, 0][b, h, position, k] if edit.value is None else edit.value
                                out[row, b, h, i, k] = new
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, ROWS - 1), positions, heads, values, positions), min_size=1, max_size=4),
    st.sampled_from(["z", "pattern", "post"]),
    st.integers(0, N_POS - 1),
)
def test_an_edit_is_what_a_loop_would_write(drawn: list, site: str, start: int):
    taken: set = set()
    edits = []
    for row, pos, head, value, k_pos in drawn:
        if row in taken:
            continue  # two edits of one place: which wins is not promised
        taken.add(row)
        where = {"neuron": head} if site == "post" else {"head": head}
        edits.append((row, Edit(site, 0, pos=pos, value=value, k_pos=k_pos if site == "pattern" else None, **where)))
    view = torch.arange(start, N_POS).expand(PROMPTS, -1)
    shape = {"z": (HEADS, WIDTH), "post": (HEADS,), "pattern": (N_POS,)}[site]
    leading = (ROWS, PROMPTS, HEADS, N_POS - start) if site == "pattern" else (ROWS, PROMPTS, N_POS - start)
    state = torch.full((*leading, *shape), 100.0)
    expected = by_loop(site, edits, state, view)
    apply(site, edits, state, view, SOURCE)
    assert torch.equal(state, expected)


def test_values_by_prompt_and_by_position():
    state = torch.zeros(ROWS, PROMPTS, N_POS, HEADS, WIDTH)
    view = torch.arange(N_POS).expand(PROMPTS, -1)
    by_prompt = torch.arange(PROMPTS * WIDTH).view(PROMPTS, WIDTH) + 1.0
    by_position = torch.arange(PROMPTS * N_POS * WIDTH).view(PROMPTS, N_POS, WIDTH) + 1.0
    edits = [(0, Edit("z", 0, head=1, pos=2, value=by_prompt)), (2, Edit("z", 0, head=3, value=by_position))]
    apply("z", edits, state, view, {})
    assert torch.equal(state[0, :, 2, 1], by_prompt)
    assert torch.equal(state[2, :, :, 3], by_position)
    assert int((state != 0).sum()) == by_prompt.numel() + by_position.numel()


def test_where_an_edit_begins_to_matter():
    same = torch.tensor([3, 0])
    assert reach(Edit("z", 0), 2, 5, same).tolist() == [3, 0]
    assert reach(Edit("z", 0, value=0.0), 2, 5, same).tolist() == [0, 0]
    assert reach(Edit("z", 0, pos=2), 2, 5, same).tolist() == [5, 2]
    assert reach(Edit("z", 0, pos=2, value=1.0), 2, 5, same).tolist() == [2, 2]
    assert reach(Edit("z", 0, pos=torch.tensor([4, -1])), 2, 5, same).tolist() == [4, 5]


def test_the_sites_that_cells_touch():
    cells = [[Edit("z", 0), Edit("q", 1, value=0.0)], [], [Edit("z", 0, head=1)]]
    assert sites_of(cells) == {("z", 0), ("q", 1)}
    assert sites_of(cells, sourced_only=True) == {("z", 0)}
