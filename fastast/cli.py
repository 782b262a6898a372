"""The `fastast` command: thin layers over the functions of the same names.

Commands import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

app = typer.Typer(
    name="fastast",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Audio Spectrogram Transformers made fast by merging similar tokens.

**Examples**

- `fastast classify clip.wav` - what is it?
- `fastast classify recordings/ --r 10 --json` - a folder, faster, for a program
- `fastast train --data digits/ --r-choices 0,5,10 --out runs/digits` - a model of your own
- `fastast evaluate --data digits/ --model runs/digits/model --r 0,5,10` - what does merging cost?
- `fastast visualize clip.wav --r 10 --out groups.png` - what was merged with what?
""",
)


def _fail(message: str, status: int) -> None:
    print(f"fastast: {message}", file=sys.stderr)
    raise SystemExit(status)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors of ours are one line on stderr, not a traceback.

    Exit status: 0, 1 where an input could not be used, 2 where an option could not.
    `FASTAST_DEBUG=1` in the environment shows tracebacks.
    """
    from fastast.audio import AudioError
    from fastast.formats import CheckpointError
    from fastast_kernels import BackendError

    try:
        app(argv)
    except (AudioError, CheckpointError, BackendError, OSError) as error:
        if os.environ.get("FASTAST_DEBUG") == "1":
            raise
        _fail(str(error), 1)
    except (ValueError, TypeError, ImportError) as error:
        if os.environ.get("FASTAST_DEBUG") == "1":
            raise
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"expected whole numbers with commas between them, not {text!r}") from None


def _options_of(config: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option a field of a dataclass; tuples are written with commas."""
    hints = get_type_hints(config)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = []
        for field in dataclasses.fields(config):
            kind, default = hints[field.name], field.default
            if get_origin(kind) is tuple:
                kind, default = str, ",".join(str(part) for part in default)
            elif get_origin(kind) in (Union, types.UnionType):
                kind = Union[kind]  # noqa: UP007 - typer reads the old form on every Python
            option = typer.Option(help=field.metadata["help"], show_default=default not in ("", None))
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
                    element = get_args(hints[name])[0]
                    try:
                        options[name] = tuple(element(p) for p in value.split(",") if p.strip())
                    except ValueError:
                        raise ValueError(
                            f"{name} must be values with commas between them, not {value!r}"
                        ) from None
            command(config(**options))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _train_config() -> type:
    from fastast.train import TrainConfig

    return TrainConfig


@app.command(name="train")
@_options_of(_train_config())
def train_command(config: Any) -> None:
    """Train an AST on your own audio, with merging on if you like.

    A run that was killed goes on when the same command is given again.

    **Examples**

    - `fastast train --data digits/ --out runs/digits`: a csv with its audio beside it, or one
      folder a class
    - `fastast train --data digits/ --r-choices 0,5,10,15`: one model that is good at many r
    - `fastast train --data esc50/ --test-split 1 --init base.safetensors --lr 1e-5`: fine-tune on
      a fold
    - `fastast train --data speech/ --optimizer adam --betas 0.95,0.999 --weight-decay 5e-7
      --schedule step --lr 2.5e-4`: the recipe of the AST paper
    """
    from rich.console import Console
    from rich.table import Table

    from fastast.train import train

    console = Console()
    metrics = train(config, report=lambda line: console.print(line, highlight=False))
    table = Table("r", "accuracy", "mAP", "clips/s", title=f"{config.out}/model")
    for row in metrics["model"]:
        table.add_row(
            str(row["r"]),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['mean_average_precision']:.4f}",
            f"{row['clips_per_second']:.0f}",
        )
    console.print(table)
