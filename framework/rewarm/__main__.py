"""``python -m rewarm``."""

from rewarm.cli.main import main

if __name__ == "__main__":
    main()
