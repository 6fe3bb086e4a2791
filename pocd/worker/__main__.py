"""The worker's program, `python -m pocd.worker`: imports all that it needs, and runs it."""

from pocd.process import importing


def run() -> None:
    """Import the worker's process, and run it."""
    with importing():
        from pocd.worker.process import main  # noqa: PLC0415 - as `importing` says
    main()


if __name__ == "__main__":
    run()
