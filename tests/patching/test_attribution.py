"""Attribution patching: plain gradients, finite differences, exact patching where it must agree, planted blindness."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.core.edits import Edit
from interp.core.readout import readout
from interp.core.rerun import rerun
from interp.models import Model, planted, program, toy
from interp.models.hooks import run
from interp.patching._qk_fix import of_key, of_keys, of_query
from interp.patching.activation import patch
from interp.patching.attribution import attribute
from interp.tasks import Task

#: Logits of the toys are about 10; sums in another order differ by 1e-6 a layer, their gradients likewise.
TOLERANCE = 5e-5
HEADED = ("q", "k", "v", "z")
SITES = (*HEADED, "resid_pre", "attn_out", "resid_mid", "post", "mlp_out", "resid_post")
AXES = ("layer", "head", "pos")


def sites_of(model: Model) -> list[str]:
    """Parallel layers have no resid_mid."""
    return [site for site in SITES if site != "resid_mid" or not program.program(model).parallel]


def every(model: Model, task: Task, sites: Sequence[str], **options) -> dict[str, np.ndarray]:
    """By site, the estimated change of the metric `[prompt layer ...]`, NaN where a prompt has padding."""
    found = attribute(model, task, sites=sites, **{"by": AXES, "min_oriented": 0.0} | options)
    unchanged = found.arrays["clean" if options.get("direction", "noising") == "noising" else "corrupt"][1]
    sizes = {"prompt": len(task), "layer": model.n_layers, "pos": task.clean.shape[1]}
    out = {}
    for site in sites:
        table = found.filter(component=site).table
        axes = [axis for axis in ("prompt", "layer", "pos", "head") if axis in table and table[axis].notna().all()]
        index = [table[axis].to_numpy(dtype=int) for axis in axes]
        out[site] = np.full([sizes.get(axis, max(at) + 1) for axis, at in zip(axes, index, strict=True)], np.nan)
        out[site][tuple(index)] = table["value_metric"] - unchanged[table["prompt"]]
    return out


def estimates(model: Model, task: Task, site: str, **options) -> np.ndarray:
    return every(model, task, [site], **options)[site]


def close(ours: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    """Equal but for rounding, which grows with the largest gradients."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * max(1, np.abs(expected).max()), err_msg=what)


def seen(model: Model, tokens: Tensor, mask: Tensor | None = None, *, grad: bool = False) -> dict[str, list[Tensor]]:
    """By site, its activation in each layer, by hooks; "logits" too."""
    sites = [site for site in SITES if site != "resid_mid"]
    names = {(site, layer): program.hook_name(site, layer) for site in sites for layer in range(model.n_layers)}
    done = run(model, tokens, capture=list(names.values()), mask=mask, grad=grad)
    found = {site: [done.cache[names[site, layer]] for layer in range(model.n_layers)] for site in sites}
    found["resid_mid"] = [stream + out for stream, out in zip(found["resid_pre"], found["attn_out"], strict=True)]
    return found | {"logits": [done.logits]}


def slow(model: Model, task: Task) -> dict[str, np.ndarray]:
    """First-order estimates of unpadded prompts, one at a time, by the bridge's hooks and plain autograd."""
    rows: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
    for index in range(len(task)):
        start = 0 if task.mask is None else int(task.mask[index].argmax())
        clean, corrupt = task.clean[index : index + 1, start:], task.corrupt[index : index + 1, start:]
        base, source = seen(model, clean, grad=True), seen(model, corrupt)
        logits = base["logits"][0][0, -1]
        metric = logits[task.answers[index]] - logits[task.wrong[index]]
        for site in SITES:
            # The stream goes on from attention's output, so that has the gradient of resid_mid.
            at = base["attn_out" if site == "resid_mid" else site]
            slope = torch.autograd.grad(metric, at, retain_graph=True)
            parts = [((s - b) * g).sum(-1)[0].detach() for s, b, g in zip(source[site], base[site], slope, strict=True)]
            product = torch.stack(parts).numpy()
            rows[site].append(np.pad(product, [(0, 0), (start, 0), *[(0, 0)] * (product.ndim - 2)]))
    return {site: np.stack(parts) for site, parts in rows.items()}


@pytest.mark.parametrize("architecture", [*toy.ARCHITECTURES, *toy.VARIANTS])
def test_equals_plain_autograd_on_the_bridge_one_prompt_at_a_time(architecture, random_model, random_task):
    model = random_model(architecture)
    task = random_task(model)
    sites = sites_of(model)
    fast, expected = every(model, task, sites), slow(model, task)
    for site in sites:
        assert np.isnan(fast[site][0, :, :2]).all() and not np.isnan(fast[site][1:]).any()
        close(np.nan_to_num(fast[site]), expected[site], site)
        assert np.abs(expected[site]).max() > 0.1, site  # or nothing was compared


@pytest.mark.parametrize("architecture", [*toy.ARCHITECTURES, *toy.VARIANTS])
def test_hooks_give_what_the_steps_give(architecture, random_model, random_task):
    model = random_model(architecture)
    task = random_task(model)
    sites = sites_of(model)
    few = [site for site in ("k", "resid_mid", "resid_post") if site in sites]
    along = {"steps": 1, "grid": "midpoint"}
    for chosen, options in ((sites, {}), (few, along), (few, {"path": "activation"} | along)):
        options = {"direction": "denoising"} | options
        fast, hooked = (every(model, task, chosen, exact_path=way, **options) for way in ("rerun", "hooks"))
        for site in chosen:
            assert (np.isnan(fast[site]) == np.isnan(hooked[site])).all()
            close(np.nan_to_num(fast[site]), np.nan_to_num(hooked[site]), site)


Runs = tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]


def both_runs(model: Model, task: Task) -> Runs:
    return seen(model, task.clean, task.mask), seen(model, task.corrupt, task.mask)


def moved(
    model: Model, task: Task, runs: Runs, site: str, edits: list[tuple[int, int | None, int]], shares: Sequence[float]
) -> list[np.ndarray]:
    """How exact patching a share of the way to the source moves the metric, for each share `[edit prompt]`."""
    cells: list[list[Edit]] = [[]]
    for share, (layer, head, pos) in itertools.product(shares, edits):
        value = torch.lerp(runs[0][site][layer], runs[1][site][layer], share)[:, pos]
        cells.append([Edit(site, layer, head=head, pos=pos, value=value if head is None else value[:, head])])
    metric = rerun(model, task.clean, cells, readout(model, task), mask=task.mask)
    return np.split((metric[1:] - metric[:1]).numpy(), len(shares))


@pytest.fixture(scope="module")
def smooth() -> Model:
    """Small weights, so that a line of a few points follows the curve."""
    return toy.random("llama", scale=0.15)


def test_equals_finite_differences(smooth, random_task):
    model = smooth
    task = random_task(model)
    sites = sites_of(model)
    fast, runs = every(model, task, sites), both_runs(model, task)
    for site in sites:
        heads = [None] if site not in HEADED else [0, model.n_key_value_heads - 1]
        edits = list(itertools.product(range(3), heads, (4, 8)))
        near, back, far, far_back = moved(model, task, runs, site, edits, (0.02, -0.02, 0.04, -0.04))
        slope = (4 * (near - back) / 0.04 - (far - far_back) / 0.08) / 3  # without the third derivative
        ours = [fast[site][:, layer, pos] if h is None else fast[site][:, layer, pos, h] for layer, h, pos in edits]
        # A metric near 10 is known to 1e-6 or so, and is divided by 0.04; the fifth derivative times 0.02^4 is left.
        np.testing.assert_allclose(np.stack(ours), slope, atol=1e-3 * max(1, np.abs(slope).max()), err_msg=site)


def test_becomes_exact_patching_as_the_change_shrinks(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    edits = list(itertools.product(range(3), range(4), (5, 8)))
    fast = estimates(model, task, "z")
    ours = np.stack([fast[:, layer, pos, head] for layer, head, pos in edits])
    shares = (0.4, 0.1, 0.025)
    exact = moved(model, task, both_runs(model, task), "z", edits, shares)
    errors = [float(np.abs(change / share - ours).mean()) for change, share in zip(exact, shares, strict=True)]
    # What is left out is of second order, so the error falls with the share, here four times each; 1.6 leaves
    # room for the third order at the first.
    assert errors[0] > 1.6 * errors[1] > 1.6 * 2.5 * errors[2] > 0


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", ["ioi_like", "cancelling_pair"])
def test_is_exact_patching_where_the_metric_is_linear(name, direction, planted_case):
    case, task = planted_case(name)
    last = case.model.n_layers - 1  # its heads write what the logits read
    ours = attribute(case.model, task, sites="z", direction=direction).filter(layer=last)
    exact = patch(case.model, task, site="z", direction=direction).filter(layer=last)
    both = ours.table.merge(exact.table, on=["prompt", "layer", "head"])
    assert both["value_x"].abs().max() > 0.4
    np.testing.assert_allclose(both["value_x"], both["value_y"], atol=TOLERANCE)
    np.testing.assert_allclose(both["value_metric_x"], both["value_metric_y"], atol=TOLERANCE)


def test_cancelling_heads_are_seen_each(planted_case):
    case, task = planted_case("cancelling_pair")
    mean = attribute(case.model, task, sites=("z", "v")).summary(by=["component", "layer", "head"])
    z = mean[mean["component"] == "z"].set_index(["layer", "head"])["mean"].round(4) + 0.0
    assert {at: value for at, value in z.items() if value} == {(1, 0): 1.0, (0, 1): 2.0, (1, 2): -2.0}


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_along_the_embeddings_the_parts_of_the_input_sum_to_the_whole(direction, smooth, random_task):
    model, task = smooth, random_task(smooth)
    read = readout(model, task)
    clean, corrupt = (rerun(model, t, [[]], read, mask=task.mask)[0].numpy() for t in (task.clean, task.corrupt))
    change = corrupt - clean if direction == "noising" else clean - corrupt
    errors = {}
    for grid, steps in (("paper", 6), ("paper", 24), ("code", 6), ("code", 24), ("midpoint", 24)):
        total = estimates(model, task, "resid_pre", direction=direction, steps=steps, grid=grid)
        errors[grid, steps] = np.abs(np.nansum(total[:, 0], axis=1) - change).max()
    # Sums at one end of each interval are off by half of (last - first slope) / m, the midpoint rule by 1/m^2.
    for grid in ("paper", "code"):
        assert 2.5 < errors[grid, 6] / errors[grid, 24] < 6
        assert errors["midpoint", 24] < 0.1 * errors[grid, 24]
    assert errors["midpoint", 24] < 0.005 * np.abs(change).max()


@pytest.mark.parametrize("site", ["z", "k", "mlp_out", "resid_mid"])
def test_along_an_activation_the_parts_sum_to_the_exact_effect_of_all(site, smooth, random_task):
    model, task = smooth, random_task(smooth)
    cells = [[], *([Edit(site, layer)] for layer in range(3))]
    metric = rerun(model, task.clean, cells, readout(model, task), source=task.corrupt, mask=task.mask)
    exact = (metric[1:] - metric[:1]).numpy().T
    parts = estimates(model, task, site, path="activation", steps=12, grid="midpoint")
    total = np.nansum(parts.reshape(3, 3, -1), axis=2)
    # The midpoint rule is off by the curvature over 24 m^2.
    np.testing.assert_allclose(total, exact, atol=0.005 * np.abs(exact).max())
    first = np.nansum(estimates(model, task, site).reshape(3, 3, -1), axis=2)
    assert np.abs(first - exact).max() > 0.03 * np.abs(exact).max()  # not so without a path


@pytest.mark.parametrize(
    ("grid", "steps", "each"),
    [("paper", 0, 0.0), ("paper", 5, 0.4), ("code", 5, 0.6), ("midpoint", 4, 0.5), ("paper", 1, 0.0), ("code", 1, 1.0)],
)
@pytest.mark.parametrize("path", ["embedding", "activation"])
def test_or_is_flat_at_the_clean_run_and_half_each_on_the_way(path, grid, steps, each, planted_case):
    case, task = planted_case("or_gate")
    path = path if steps else "embedding"
    found = attribute(case.model, task, sites="z", steps=steps, grid=grid, path=path)
    mean = found.summary(by=["layer", "head"]).set_index(["layer", "head"])["mean"]
    # min(1, a + b) has slope 1 for a + b < 1, which is the share k/m < 1/2 of the way from (0, 0) to (1, 1).
    wanted = dict.fromkeys(mean.index, 0.0) | {(0, 1): each}
    if path == "embedding":
        wanted[1, 2] = each
    else:  # head (1, 2) goes alone, and the other holds the sum at 1
        wanted[1, 2], wanted[0, 1] = 0.0, 0.0
        if grid == "code":  # at the source itself the sum is just 1, where relu'(0) = 0
            assert steps in (1, 5)
    assert mean.to_dict() == pytest.approx(wanted, abs=1e-5)


def test_and_is_seen_from_the_clean_run_only(planted_case):
    case, task = planted_case("and_gate")
    for direction, each in (("noising", 1.0), ("denoising", 0.0)):
        mean = attribute(case.model, task, sites="z", direction=direction).grid("layer", "head")
        np.testing.assert_allclose(mean.to_numpy(), [[0, each, 0], [0, 0, each]], atol=1e-5)


def test_a_ceiling_hides_its_head_at_one_end_and_inflates_it_at_the_other(planted_case):
    case, task = planted_case("saturation")
    reader = {"layer": 1, "head": 1}
    exact = patch(case.model, task, site="z", direction="noising").filter(**reader).table["value"]
    assert exact.to_numpy() == pytest.approx(1.0, abs=1e-5)

    def value(**options) -> float:
        return attribute(case.model, task, sites="z", **options).filter(**reader).table["value"].mean()

    assert value() == pytest.approx(0.0, abs=1e-5)
    assert value(direction="denoising") == pytest.approx(6.0, abs=1e-4)
    # The slope is 6 (of the gap) on the first sixth of the way: two of twelve points.
    assert value(steps=12, grid="midpoint", path="activation") == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_through_the_softmax_a_saturated_head_is_exact(direction):
    case = planted.induction_like(sharpness=60.0)
    task = Task(case.name, case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions)
    head = {"layer": 1, "head": 0}  # after it everything is linear
    for site, by in itertools.product(("q", "k"), (("layer", "head"), AXES)):
        exact = patch(case.model, task, site=site, by=by, direction=direction).filter(**head).table
        options = {"sites": site, "by": by, "direction": direction}
        plain = attribute(case.model, task, **options).filter(**head).table
        fixed = attribute(case.model, task, qk_fix=True, **options).filter(**head).table
        on = [axis for axis in ("prompt", "layer", "head", "pos") if axis in exact]
        both = fixed.merge(exact, on=on)
        assert both["value_y"].abs().max() > 0.4
        assert plain["value"].abs().max() < 1e-4  # the derivative of the softmax is gone
        np.testing.assert_allclose(both["value_x"], both["value_y"], atol=TOLERANCE, err_msg=f"{site} by {by}")


@pytest.mark.parametrize("architecture", ["llama", "gemma", "mistral", "gpt2", "qwen3", "gemma2"])
def test_through_the_softmax_equals_recomputing_each_pattern(architecture, random_model, random_task):
    """One key or query at a time, by the steps; the gradient by the pattern from autograd."""
    model = random_model(architecture)
    task = random_task(model)
    steps = program.program(model)
    frame = steps.frame(task.clean, task.mask)
    read = readout(model, task)
    with torch.enable_grad():
        logits, base = program.forward(steps, task.clean, task.mask, capture=("q", "k", "pattern"))
        layers = range(model.n_layers)
        gradients = torch.autograd.grad(read.of(logits).sum(), [base["pattern", layer] for layer in layers])
    base = {at: value.detach() for at, value in base.items()}
    with torch.no_grad():
        source = program.forward(steps, task.corrupt, task.mask, capture=("q", "k"))[1]
    n_heads = {"q": model.n_heads, "k": model.n_key_value_heads}

    @torch.no_grad()
    def effect(layer: int, site: str, where: tuple) -> Tensor:
        put = {part: base[part, layer].clone() for part in ("q", "k")}
        put[site][where] = source[site, layer][where]
        norms = {"q": steps.layers[layer].q_norm, "k": steps.layers[layer].k_norm}
        rotated = (steps.rotate(norms[part](put[part]), frame.rotary) for part in ("q", "k"))
        pattern = steps.pattern(steps.scores(*rotated, steps.allowed(layer, frame)))
        return ((pattern - base["pattern", layer]) * gradients[layer]).sum((1, 2, 3))

    for site in ("q", "k"):
        single = estimates(model, task, site, qk_fix=True)
        joint = estimates(model, task, site, qk_fix=True, by=("layer", "head"))
        for layer, head in itertools.product(layers, range(n_heads[site])):
            whole = (slice(None), slice(None), head)
            np.testing.assert_allclose(joint[:, layer, head], effect(layer, site, whole), atol=TOLERANCE)
            for pos in (3, 5, 8):
                one = effect(layer, site, (slice(None), pos, head))
                np.testing.assert_allclose(single[:, layer, pos, head], one, atol=TOLERANCE, err_msg=site)
        assert np.nanmax(np.abs(single - estimates(model, task, site))) > 0.1  # the derivative says something else


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 3000.0])
def test_a_new_key_in_closed_form_equals_a_new_softmax(sharpness, random_model):
    steps = program.program(random_model("llama"))
    generator = torch.Generator().manual_seed(0)
    batch, n_pos = 2, 7
    frame = steps.frame(torch.zeros(batch, n_pos, dtype=torch.long))
    q = torch.randn(batch, n_pos, 4, 8, generator=generator) * sharpness
    k, new = (torch.randn(batch, n_pos, 2, 8, generator=generator) for _ in range(2))
    gradient = torch.randn(batch, 4, n_pos, n_pos, generator=generator)

    def pattern(keys: Tensor) -> Tensor:
        """Attention in float64."""
        rotated = (steps.rotate(part, frame.rotary) for part in (q, keys))
        return steps.scores(*rotated, frame.allowed).double().softmax(-1)

    closed = of_key(steps, 0, frame, q, k, new, gradient)
    for pos, group in itertools.product(range(n_pos), range(2)):
        changed = k.clone()
        changed[:, pos, group] = new[:, pos, group]
        expected = ((pattern(changed) - pattern(k)) * gradient).sum((1, 2, 3))
        np.testing.assert_allclose(closed[:, pos, group], expected, atol=2e-5)
    alone = of_keys(steps, 0, frame, q, k, new, gradient)
    np.testing.assert_allclose(alone.sum((1, 2)), ((pattern(new) - pattern(k)) * gradient).sum((1, 2, 3)), atol=5e-5)
    np.testing.assert_allclose(of_query(steps, 0, frame, q, k, q, gradient), 0, atol=0)


def test_what_by_leaves_out_is_summed(random_model, random_task):
    model = random_model("llama")
    task = random_task(model, padded=False)
    for site in ("z", "k"):
        whole = estimates(model, task, site, by=AXES)
        np.testing.assert_allclose(estimates(model, task, site, by=("layer", "head")), whole.sum(2), atol=TOLERANCE)
        np.testing.assert_allclose(estimates(model, task, site, by=("layer", "pos")), whole.sum(3), atol=TOLERANCE)
        np.testing.assert_allclose(estimates(model, task, site, by="layer"), whole.sum((2, 3)), atol=TOLERANCE)


@pytest.mark.parametrize("way", ["rerun", "hooks"])
def test_other_sources_are_what_activation_patching_puts_there(way, random_model, random_task):
    model = random_model("llama")
    task = random_task(model, padded=False)
    first = estimates(model, task, "z")
    base, source = (
        torch.stack(seen(model, tokens)["z"], 1).numpy() for tokens in (task.clean, task.corrupt)
    )  # fmt: skip
    steps = program.program(model)
    with torch.enable_grad():
        logits, cache = program.forward(steps, task.clean, capture=("z",))
        gradient = torch.autograd.grad(readout(model, task).of(logits).sum(), [cache["z", layer] for layer in range(3)])
    gradient = torch.stack(gradient, 1).numpy()
    np.testing.assert_allclose(((source - base) * gradient).sum(-1), first, atol=TOLERANCE)
    values = {"zero": 0 * base, "mean": base.mean((0, 2), keepdims=True), "position_mean": base.mean(0, keepdims=True)}
    for name, value in values.items():
        ours = estimates(model, task, "z", source=name, exact_path=way)
        np.testing.assert_allclose(ours, ((value - base) * gradient).sum(-1), atol=TOLERANCE, err_msg=name)
    other = estimates(model, task, "z", source="resample", seed=3, exact_path=way)
    assert any(
        np.allclose(other, ((base[list(order)] - base) * gradient).sum(-1), atol=TOLERANCE)
        for order in ((1, 2, 0), (2, 0, 1))
    )


def test_means_by_position_stay_at_their_positions_under_padding(random_model, random_task):
    model = random_model("llama")
    options = {"source": "position_mean", "reference": random_task(model, padded=False)}
    fast, hooked = (
        estimates(model, random_task(model), "z", exact_path=way, **options) for way in ("rerun", "hooks")
    )  # fmt: skip
    close(np.nan_to_num(fast), np.nan_to_num(hooked))
