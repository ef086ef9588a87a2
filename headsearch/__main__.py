"""``python -m headsearch`` is the command ``headsearch``."""

from headsearch.cli.app import main

if __name__ == "__main__":
    main()
