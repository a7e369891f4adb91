"""Does a look at higher layers help? Back attention on a frozen model: its effect on a task, kept and read again.

`interp.dynamics.back_attention` trains it, on a loaded model or inside a small transformer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from interp.core.metrics import log_prob, logit_diff
from interp.core.registry import method
from interp.core.result import Result
from interp.models.back_attention import Attached, BackAttention
from interp.models.model import Model
from interp.tasks.task import Task

__all__ = ["Attached", "BackAttention", "effect", "load", "save"]

_WEIGHTS, _ABOUT = "back_attention.safetensors", "back_attention.json"
_UNITS = {
    "accuracy": "1 where the answer has the largest logit of all tokens, else 0",
    "log-probability": "nats, of the answer",
    "logit difference": "logits, answer minus wrong answer",
}


@method(name="Back attention", paper="arXiv:2502.10835", notebook="back_attention")
def effect(model: Model, back: BackAttention, task: Task, *, batch_size: int = 32) -> Result:
    """What the model answers without and with back attention, prompt by prompt (arXiv:2502.10835).

    Args:
        model: a decoder.
        back: the module, trained for this model or not.
        task: prompts with answers; wrong answers add a metric.
        batch_size: prompts at a time.

    Returns:
        A row for each prompt and metric, of `meta["units"]`: columns `prompt`, `metric`, `value_before`, `value_after`
        and `value` (after minus before). `meta` has the number of parameters added, and as a share of the model's.

    Raises:
        ValueError: a task without answers, or what `Attached` refuses.

    Cost: three forward passes over the prompts at most.

    Example:
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> task = Task.from_pairs(model, "own", ["w2 w3"], ["w2 w4"], [" w5"], [" w6"])
        >>> back = BackAttention(model.d_model, source=0, target=2, d_inner=4)
        >>> result = effect(model, back, task)
        >>> result.table["metric"].tolist(), bool((result.table["value"] == 0).all())
        (['accuracy', 'log-probability', 'logit difference'], True)
    """
    if task.answers is None:
        raise ValueError(f"task {task.name!r} has no answers, so nothing can be right or wrong: give one that has.")
    attached = Attached(model, back)
    tables = []
    for start in range(0, len(task), batch_size):
        part = task[start : start + batch_size]
        with torch.no_grad():
            before, after = (run(part.clean, part.mask)[:, -1] for run in (model, attached))
        assert part.answers is not None
        measured = {
            "accuracy": [(logits.argmax(-1) == part.answers).double() for logits in (before, after)],
            "log-probability": [log_prob(logits, part.answers) for logits in (before, after)],
        }
        if part.wrong is not None:
            measured["logit difference"] = [logit_diff(logits, part.answers, part.wrong) for logits in (before, after)]
        for metric, (old, new) in measured.items():
            columns = {"value_before": old.double().cpu().numpy(), "value_after": new.double().cpu().numpy()}
            tables.append(pd.DataFrame({"prompt": range(start, start + len(part)), "metric": metric, **columns}))
    table = pd.concat(tables, ignore_index=True)
    table["value"] = table["value_after"] - table["value_before"]
    n_added = sum(weight.numel() for weight in back.parameters())
    n_model = sum(weight.numel() for weight in model.bridge.parameters())
    meta = {
        **model.provenance, "task": task.name, "task_fingerprint": task.fingerprint, "source": back.source,
        "target": back.target, "d_inner": back.d_inner, "n_heads": back.n_heads, "n_parameters": n_added,
        "share_of_model": n_added / n_model, "units": _UNITS,
    }  # fmt: skip
    return Result("Back attention", table, "by metric: see meta['units']", meta=meta)


def save(back: BackAttention, model: Model, folder: str | os.PathLike[str]) -> Path:
    """Keep a back-attention module, with the model it belongs to.

    Args:
        back: the module.
        model: the model on which it was trained.
        folder: where; made if it is not there. An earlier module in it is replaced.

    Returns:
        The folder, with the weights as safetensors and the sizes, layers and the model's fingerprint as JSON.

    Example:
        >>> import tempfile
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(BackAttention(model.d_model, source=0, target=2, d_inner=4), model, folder)
        ...     load(model, folder).target
        2
    """
    Attached(model, back)  # refuses a module that does not fit
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    about = {
        "model": model.name, "model_fingerprint": model.fingerprint, "weights": model.weights,
        "sizes": {
            "d_model": back.d_model, "source": back.source, "target": back.target, "d_inner": back.d_inner,
            "n_heads": back.n_heads,
        },
    }  # fmt: skip
    save_file({name: weight.detach().contiguous() for name, weight in back.named_parameters()}, place / _WEIGHTS)
    (place / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return place


def load(model: Model, folder: str | os.PathLike[str]) -> BackAttention:
    """A back-attention module that `save` kept, for the same model.

    Args:
        model: the model on which it was trained.
        folder: where it was kept.

    Returns:
        The module, on the model's device.

    Raises:
        FileNotFoundError: no module in the folder.
        ValueError: another model, the same one with other weights ("processed" or "raw": their streams differ), or
            files that cannot be read.
    """
    place = Path(folder)
    if not ((place / _ABOUT).is_file() and (place / _WEIGHTS).is_file()):
        raise FileNotFoundError(
            f"{place} holds no back attention ({_ABOUT} and {_WEIGHTS}): give the folder of `save`."
        )
    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(place / _WEIGHTS)
        theirs = (about["model"], about["model_fingerprint"], about["weights"])
        sizes = about["sizes"]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the back attention in {place} cannot be read ({error}): train and save it again.") from None
    if theirs[1:] != (model.fingerprint, model.weights):
        raise ValueError(
            f"the back attention in {place} was trained on {theirs[0]} ({theirs[2]} weights, fingerprint "
            f"{theirs[1][:12]}), not on {model.name} ({model.weights} weights, {model.fingerprint[:12]}): load that "
            "model, or train it anew on this one."
        )
    back = BackAttention(**sizes)
    for name, weight in back.named_parameters():
        if name not in tensors or tensors[name].shape != weight.shape:
            raise ValueError(f"the back attention in {place} has no {name} of {tuple(weight.shape)}: save it again.")
        weight.data = tensors[name]
    return Attached(model, back).back
