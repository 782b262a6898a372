"""What the commands share: options, how their text is read, and a progress bar."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    import torch


def tuple_of(name: str, element: type, text: str) -> tuple[Any, ...]:
    """Values written with commas between them."""
    try:
        return tuple(element(part) for part in text.split(",") if part.strip())
    except ValueError:
        kind = {"int": "whole numbers", "float": "numbers"}.get(element.__name__, "values")
        raise ValueError(f"{name} must be {kind} with commas between them, not {text!r}") from None


def options_of(config: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Give a command one option for each field of a dataclass; tuples are written with commas."""
    hints = get_type_hints(config)

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        parameters = []
        for field in dataclasses.fields(config):
            kind, default = hints[field.name], field.default
            if get_origin(kind) is tuple:
                kind, default = str, ",".join(map(str, getattr(config, field.name)))
            text = field.metadata["help"]
            option = typer.Option(help=text, show_default=default not in ("", None))
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=Annotated[kind, option],
                )
            )

        def run(**options: Any) -> None:
            for name, value in options.items():
                if get_origin(hints[name]) is tuple:
                    options[name] = tuple_of(name, get_args(hints[name])[0], value)
            command(config(**options))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


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
