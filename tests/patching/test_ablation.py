"""Ablation of sets: by hand, complements, planted truth, what the choice of source does, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from interp.core.edits import Edit
from interp.core.readout import readout
from interp.models import load, run
from interp.models.vision import toy_vit
from interp.patching.ablation import ablate
from interp.patching.activation import patch

#: Logits of the toys are about 10; sums in another order differ by 1e-6 a layer.
TOLERANCE = 1e-4


def by_set(result, column="value"):
    return {name: rows[column].to_numpy() for name, rows in result.table.groupby("target")}


def by_hand(model, task, edit):
    """The metric with a function of (z, layer) made to every layer's z."""
    hooks = [
        (f"blocks.{layer}.attn.hook_z", lambda z, hook, layer=layer: edit(z.clone(), layer))
        for layer in range(model.n_layers)
    ]
    return readout(model, task).of(run(model, task.clean, hooks=hooks, mask=task.mask).logits).numpy()


def test_a_set_and_its_complement_by_hand(random_model, random_task):
    model = random_model("llama")
    task = random_task(model, n=4)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    cache = run(model, task.clean, capture=names, mask=task.mask).cache
    means = [cache[name][task.mask.bool()].mean(0) for name in names]
    heads = {(0, 1), (1, 3), (2, 0)}

    def edit(kept, source):
        def set_to(z, layer):
            for head in range(4):
                if ((layer, head) in heads) != kept:
                    z[:, :, head] = means[layer][head] if source == "mean" else 0.0
            return z

        return set_to

    seen = []
    for source in ("mean", "zero"):
        for keep in (False, True):
            result = ablate(model, task, {"set": sorted(heads)}, source=source, keep=keep)
            expected = by_hand(model, task, edit(keep, source))
            np.testing.assert_allclose(by_set(result)["set"], expected, atol=TOLERANCE)
            clean = result.arrays["clean"][1]
            np.testing.assert_allclose(by_set(result, "value_drop")["set"], clean - expected, atol=TOLERANCE)
            seen.append(expected)
    assert result.unit == "logits"
    assert min(np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]) > 0.1


@pytest.mark.parametrize("source", ["mean", "position_mean", "zero", "resample", "corrupt"])
def test_identities_of_sets(source, random_model, random_task):
    model = random_model("gpt2")
    task = random_task(model, n=4, padded=False)
    among = ("z", "mlp_out")
    everything = [Edit(site, layer) for site in among for layer in range(3)]
    part = [(0, 1), (2, 2), Edit("mlp_out", 1)]
    rest = [(layer, head) for layer in range(3) for head in range(4) if (layer, head) not in {(0, 1), (2, 2)}]
    rest += [Edit("mlp_out", 0), Edit("mlp_out", 2)]
    sets = {"nothing": [], "everything": everything, "part": part, "rest": rest}
    removed = by_set(ablate(model, task, sets, source=source))
    kept = by_set(ablate(model, task, sets, source=source, keep=True, among=among))
    for one, other in (("nothing", "everything"), ("part", "rest")):
        np.testing.assert_allclose(removed[one], kept[other], atol=TOLERANCE)
        np.testing.assert_allclose(removed[other], kept[one], atol=TOLERANCE)
    clean = readout(model, task).of(run(model, task.clean).logits)
    np.testing.assert_allclose(removed["nothing"], clean, atol=TOLERANCE)
    assert np.abs(removed["everything"] - removed["part"]).max() > 0.01
    alone = by_set(ablate(model, task, {"nothing": []}, source=source))
    np.testing.assert_allclose(alone["nothing"], clean, atol=TOLERANCE)
    # A sweep of single ablations is `patch`.
    sweep = patch(model, task, source=source, direction="noising", layers=[2], heads=[2])
    single = ablate(model, task, {"one": [(2, 2)]}, source=source)
    np.testing.assert_allclose(single.table["value"], sweep.table["value_metric"], atol=TOLERANCE)


def test_a_set_is_kept_only_where_it_is_named(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    early, end = task.positions["early"], 8
    # The last layer is kept whole, so that what layer 1 writes at every position can be seen.
    last = [(2, head) for head in range(4)]

    def edit(kept_at):
        def set_to(z, layer):
            if layer == 2:
                return z
            kept = z[:, :, 1].clone()
            z[:] = 0.0
            for prompt, positions in enumerate(kept_at if layer == 1 else []):
                z[prompt, positions, 1] = kept[prompt, positions]
            return z

        return set_to

    here, there = Edit("z", 1, head=1, pos=early), Edit("z", 1, head=1, pos=end)
    sets = {
        "early": ([here, *last], [[int(p)] for p in early]),
        "both": ([here, there, *last], [[int(p), end] for p in early]),
        "head": ([there, (1, 1), *last], [list(range(9))] * 3),
    }
    places = {name: components for name, (components, _) in sets.items()}
    found = by_set(ablate(model, task, places, source="zero", keep=True))
    for name, (_, kept_at) in sets.items():
        np.testing.assert_allclose(found[name], by_hand(model, task, edit(kept_at)), atol=TOLERANCE)
    assert min(np.abs(found["both"] - found[name]).max() for name in ("early", "head")) > 0.01
    slow = by_set(ablate(model, task, places, source="mean", keep=True, exact_path="hooks", batch_size=2))
    fast = by_set(ablate(model, task, places, source="mean", keep=True))
    for name in sets:
        np.testing.assert_allclose(slow[name], fast[name], atol=TOLERANCE)


def test_a_planted_circuit_alone_does_the_task_and_nothing_is_left_without_it(planted_case):
    case, task = planted_case("ioi_like")
    circuit = {"circuit": sorted(case.heads), "inhibition": [(1, 0)]}
    alone = by_set(ablate(case.model, task, circuit, source="corrupt", keep=True))
    without = by_set(ablate(case.model, task, circuit, source="corrupt"))
    clean, corrupt = (patch(case.model, task, layers=[0], heads=[0]).arrays[which][1] for which in ("clean", "corrupt"))
    np.testing.assert_allclose(alone["circuit"], clean, rtol=1e-3)
    np.testing.assert_allclose(without["circuit"], corrupt, rtol=1e-3)
    # The inhibition head is the only way in, but it needs the others to get there.
    np.testing.assert_allclose(without["inhibition"], corrupt, rtol=1e-3)
    assert (alone["inhibition"] < 0.1 * clean).all()


def test_the_reference_gives_the_means(random_model, random_task):
    model = random_model("llama")
    task = random_task(model, padded=False)
    one = {"head": [(1, 2)]}
    # The mean over the corrupted prompts at each position, of one prompt: the paired prompt itself.
    single = task[:1]
    paired = ablate(model, single, one, source="corrupt")
    mean = ablate(model, single, one, source="position_mean", reference=replace(single, clean=single.corrupt))
    np.testing.assert_allclose(mean.table["value"], paired.table["value"], atol=TOLERANCE)
    assert abs(paired.table["value_drop"].item()) > 0.01
    own, other = (
        ablate(model, task, one, reference=reference).table["value"].to_numpy()
        for reference in (None, replace(task, clean=task.corrupt))
    )
    assert np.abs(own - other).max() > 1e-3


def test_refusals(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    head = {"one": [(0, 0)]}
    for options, message in (
        ({"sets": {}}, "there are no sets"),
        ({"sets": {"one": [(3, 0)]}}, "layers 0 to 2"),
        ({"source": "median"}, "source 'median' is not known"),
        ({"source": "resample"}, "only one of 7 tokens"),
        ({"source": "position_mean"}, "different lengths"),
        ({"source": "zero", "reference": task}, "reference= gives the prompts of a mean"),
        ({"sets": {"one": [Edit("mlp_out", 0)]}, "keep": True}, "set 'one' keeps an edit of 'mlp_out'.* extend among="),
        ({"sets": {"one": [Edit("z", 0, value=0.0)]}, "keep": True}, "'z' with a value"),
        ({"keep": True, "among": ("attn_out",)}, "among='attn_out' is not known; use any of z, mlp_out"),
        ({"keep": True, "among": ()}, "leaves nothing to ablate"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(model, task, **{"sets": head, **options})
    with pytest.raises(ValueError, match="no corrupted prompts"):
        ablate(model, replace(task, corrupt=None), head, source="corrupt")
    with pytest.raises(ValueError, match="load a decoder"):
        ablate(load(toy_vit()), task, head)
