import signal

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell ignores it for jobs in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `cli.run` takes it over: no traceback of an import

from .app.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
