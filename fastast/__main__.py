"""`python -m fastast`: the command line."""

from __future__ import annotations

from fastast.cli import main

if __name__ == "__main__":
    main()
