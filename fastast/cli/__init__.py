"""The `fastast` command: thin layers over the functions of the same names.

Commands import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from .data import stats
from .files import classify, visualize
from .measuring import bench, demo, env, tune
from .reproducing import reproduce
from .teaching import probe, teacher
from .training import evaluate, sweep, train

__all__ = ["app", "main"]

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
- `fastast sweep --data digits/ --model runs/digits/model --r 0:40:5` - and what does it gain?
- `fastast teacher --arch mn04 --weights mn04.safetensors --data esc50/` - a CNN to learn from
- `fastast reproduce table2 --data esc50/` - the experiments of the paper
- `fastast bench` - what does merging gain on this machine, and where does it not pay?
- `fastast tune` - which launch parameters are fastest on this GPU?
- `fastast visualize clip.wav --r 10 --out groups.png` - what was merged with what?
""",
)

# In the order of `--help`.
for _command in (
    classify,
    train,
    stats,
    teacher,
    evaluate,
    probe,
    sweep,
    reproduce,
    bench,
    tune,
    visualize,
    demo,
    env,
):
    app.command()(_command)


def _fail(message: str, status: int) -> NoReturn:
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

    if argv is None and sys.argv[1:2] == ["bench"] and not {"-h", "--help"} & set(sys.argv):
        from fastast.benchmark.timing import in_measuring_environment

        in_measuring_environment()
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
