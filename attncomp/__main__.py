"""``python -m attncomp`` is the ``attncomp`` command."""

from __future__ import annotations

from attncomp.cli import main

if __name__ == "__main__":
    main()
