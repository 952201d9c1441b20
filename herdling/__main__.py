"""`python -m herdling` is the `herdling` command."""

from herdling.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
