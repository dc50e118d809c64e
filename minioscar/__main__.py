import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `cli.run` takes it over: no traceback of an import

from .cli import main  # noqa: E402

raise SystemExit(main())
