"""``python -m rewarm``, and the ``rewarm`` script."""

import signal

_LISTENS = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _LISTENS:
    # An interrupt during the imports below would show where they were.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from rewarm.engine.threads import wait_passively  # noqa: E402

wait_passively()

from rewarm.cli.main import main  # noqa: E402

if _LISTENS:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    main()
