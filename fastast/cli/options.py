"""What the commands share: options, how their text is read, and a progress bar."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from fastast import recipes

if TYPE_CHECKING:
    import torch

    from fastast.data import AudioDataset


def tuple_of(name: str, element: type, text: str) -> tuple[Any, ...]:
    """Values written with commas between them."""
    try:
        return tuple(element(part) for part in text.split(",") if part.strip())
    except ValueError:
        kind = {"int": "whole numbers", "float": "numbers"}.get(element.__name__, "values")
        raise ValueError(f"{name} must be {kind} with commas between them, not {text!r}") from None


def options_of(config: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Give a command one option for each field of a dataclass; tuples are written with commas.

    A `--recipe` of `fastast.recipes` sets any of them. What is given on the command line wins over
    the recipe, and the recipe over the defaults.
    """
    hints = get_type_hints(config)

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        parameters = [_parameter("context", typer.Context), _parameter("recipe", RecipeOption, "")]
        for field in dataclasses.fields(config):
            kind, default = hints[field.name], field.default
            if get_origin(kind) is tuple:
                kind, default = str, ",".join(map(str, getattr(config, field.name)))
            text = field.metadata["help"]
            option = typer.Option(help=text, show_default=default not in ("", None))
            parameters.append(_parameter(field.name, Annotated[kind, option], default))

        def run(context: Any, recipe: Any, **options: Any) -> None:
            parts = [part.strip() for part in recipe.split(",")]
            values = recipes.read(*filter(None, parts))
            for name, value in options.items():
                if context.get_parameter_source(name).name == "DEFAULT":
                    continue
                if get_origin(hints[name]) is tuple:
                    value = tuple_of(name, get_args(hints[name])[0], value)
                values[name] = value
            command(config(**values))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}  # or typer would read these types instead of the signature's
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameter(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


RecipeOption = Annotated[
    str,
    typer.Option(
        help=f"options to start from: {', '.join(recipes.names())} or a .yaml file; several with "
        "commas, later ones win",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str, typer.Option(help="folder, checkpoint or Hugging Face id [the shipped digits model]")
]
ROption = Annotated[
    str, typer.Option(help="tokens merged in each block: 20, '20,-1' or one number a block")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
BatchOption = Annotated[int, typer.Option(min=1, help="clips or windows a forward")]
InferenceDtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or int8: on a CPU, the blocks' products")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for a program")]
DataOption = Annotated[str, typer.Option(help="csv, folder with a csv, or folder of class folders")]
SplitOption = Annotated[str, typer.Option(help="split or fold; '!1' is all but fold 1")]
RootsOption = Annotated[str, typer.Option(help="folders and zips with the audio, with commas")]
PathColumnOption = Annotated[str, typer.Option(help="csv column with the file name")]
TargetColumnOption = Annotated[str, typer.Option(help="csv column with the class")]
SplitColumnOption = Annotated[str, typer.Option(help="csv column with the split or fold")]
WhereOption = Annotated[
    str, typer.Option(help="use only rows of the csv with this value: column=value")
]
SubsetOption = Annotated[str, typer.Option(help="esc10 (of ESC-50) or kws12 (of Speech Commands)")]


def load_clips(
    data: str,
    split: str,
    sample_rate: int,
    roots: str,
    columns: tuple[str, str, str],
    where: str,
    subset: str,
    progress: bool,
) -> AudioDataset:
    """One split of the data that a command's options name; `columns`: path, target and split."""
    from fastast.data import AudioDataset, list_clips

    chosen = {name: text for name, text in (("where", where), ("subset", subset)) if text}
    listing = list_clips(data, tuple_of("roots", str, roots), *columns, **chosen)
    return AudioDataset.load(listing, split, sample_rate, progress=progress)


def dtype_of(name: str, auto: Callable[[], torch.dtype] | None = None) -> torch.dtype:
    """The dtype that an option names; with ``auto``, what that returns for "auto"."""
    import torch

    if auto is not None and name == "auto":
        return auto()
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        first = "one of" if auto is None else "auto,"
        raise ValueError(f"dtype must be {first} {', '.join(dtypes)}, not {name!r}")
    return dtypes[name]


def inference_dtype_of(name: str) -> torch.dtype | Literal["int8"]:
    """The dtype that an option names, of those that `fastast.optimize` takes."""
    if name == "int8":
        return "int8"
    try:
        return dtype_of(name)
    except ValueError as error:
        raise ValueError(str(error).replace("float16, not", "float16, int8, not")) from None


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr while the block runs, to be called with what is done and the share of it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # No thread of its own, which would draw while the clock runs.
    hidden = not console.is_terminal
    with Progress(console=console, auto_refresh=False, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share, refresh=True)
