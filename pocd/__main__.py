"""The command `pocd`, and `python -m pocd`: what has to be done before the slow imports, and then the command line."""

from pocd.process import begin, importing


def main() -> None:
    """Run the command line as this process."""
    begin()
    with importing():
        from pocd.cli.main import main as command_line  # noqa: PLC0415 - takes seconds, in which signals have to wait

    command_line()


if __name__ == "__main__":
    main()
