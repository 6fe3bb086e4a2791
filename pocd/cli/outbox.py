"""`pocd outbox`: look at the batches of a running daemon, send them again, give them up."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003 - typer reads it
from typing import Annotated, Any
from urllib.parse import quote

import typer

from pocd.cli import report
from pocd.cli.api import ConfigOption, TokenOption, UrlOption, call_api, echo
from pocd.config.settings import DEFAULT_PATH, load_store
from pocd.process import EXIT_CRASH, EndedError

app = typer.Typer(no_args_is_help=True, help="Look at batches, send them again, give them up.")

STATES = "pending, delivered, dead, expired or withdrawn"
IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of batches to select.")]
ReceiverOption = Annotated[str | None, typer.Option("--receiver", help="Select batches of this receiver only.")]
StatesOption = Annotated[
    list[str] | None, typer.Option("--state", help=f"Select batches in this state only, may be repeated: {STATES}.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Select all batches that are no longer sent.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the API's whole answer.")]


@app.command("list")
def list_batches(
    *,
    state: Annotated[str | None, typer.Option(help=f"{STATES}. Default: all but delivered.")] = None,
    receiver: ReceiverOption = None,
    limit: Annotated[int, typer.Option(help="Batches at most.", min=1, max=1000)] = 100,
    after: Annotated[
        str | None, typer.Option(help="List what follows this place, as printed under the last page.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
) -> None:
    """Show batches that wait or are no longer sent, with reasons, attempts and ages."""
    given = {"state": state, "receiver": receiver, "limit": str(limit), "after": after}
    query = {key: value for key, value in given.items() if value is not None}
    body = call_api("GET", "/api/v1/outbox", config, url, token_file, query=query)
    echo(report.as_json(body) if as_json else report.outbox_as_text(body))


@app.command()
def show(
    batch: Annotated[str, typer.Argument(metavar="ID", help="The batch's id.")],
    *,
    as_json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
) -> None:
    """Show one batch: its delivery to each receiver, and its content."""
    path = f"/api/v1/outbox/{quote(batch, safe='')}"
    body = call_api("GET", path, config, url, token_file)
    echo(report.as_json(body) if as_json else report.batch_as_text(body))


@app.command()
def retry(
    ids: IdsArgument = None,
    *,
    receiver: ReceiverOption = None,
    state: StatesOption = None,
    every: AllOption = False,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
) -> None:
    """Send dead or expired batches again, and try their receivers at once, also parked ones."""
    body = _selection(ids, receiver, state, every, "retry")
    queued, asked = _to_the_end("/api/v1/outbox/retry", body, "queued", config, url, token_file)
    echo(f"{queued} batches queued again; asked at once: {', '.join(sorted(asked)) or 'nobody'}")


@app.command()
def purge(
    ids: IdsArgument = None,
    *,
    receiver: ReceiverOption = None,
    state: StatesOption = None,
    every: AllOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
) -> None:
    """Give up dead, expired or withdrawn batches for good."""
    body = _selection(ids, receiver, state, every, "purge")
    if not yes:
        typer.confirm("These proofs will not be sent any more and are deleted. Go on?", abort=True)
    purged, _ = _to_the_end("/api/v1/outbox/purge", body, "purged", config, url, token_file)
    echo(f"{purged} batches given up")


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; with a daemon, where that may write.")],
    *,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
) -> None:
    """Copy the store into a new file, of a running daemon without a stop, or where none runs."""
    from pocd.check.store import holder
    from pocd.store.backup import back_up_closed

    file = file.absolute()
    path = None if url else load_store(config).path
    if path is not None and _may_read(path) and holder(path) is None:
        size = back_up_closed(path, file)
    else:
        answer: dict[str, Any] = {"complete": False}
        while not answer["complete"]:
            answer = call_api("POST", "/api/v1/outbox/backup", config, url, token_file, body={"file": str(file)})
        size = answer["bytes"]
    echo(f"{file}: {size} bytes")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A copy that `pocd outbox backup` made.")],
    *,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Put a copy in the store's place; the daemon has to be stopped. The store that was there is moved aside."""
    from pocd.check.store import holder
    from pocd.store.backup import restore as put_back

    path = load_store(config).path
    if (process := holder(path)) is not None:
        raise EndedError(EXIT_CRASH, f"process {process} holds {path}: stop pocd first")
    aside = put_back(path, file, datetime.now(UTC).strftime("before-restore-%Y%m%dT%H%M%SZ"))
    echo(f"{path} is the copy {file} now" + (f"; what was there is {aside}" if aside else ""))


def _may_read(path: Path) -> bool:
    """Tell whether this user may look at the store's file, and so at who holds it: else only the daemon can copy it."""
    try:
        path.open("rb").close()
    except PermissionError:
        return False
    except OSError:
        pass  # what else is wrong with it, the copying tells
    return True


def _to_the_end(
    path: str, body: dict[str, Any], count: str, config: Path, url: str | None, token_file: Path | None
) -> tuple[int, set[str]]:
    """Ask for an operation until none of its batches is left; returns their number, and their receivers."""
    done, receivers = 0, set[str]()
    while True:
        answer = call_api("POST", path, config, url, token_file, body=body)
        done += answer[count]
        receivers |= set(answer["receivers"])
        if answer["complete"] or not answer[count]:
            return done, receivers
        typer.echo(f"{done} batches so far", err=True)


def _selection(
    ids: list[str] | None,
    receiver: str | None,
    states: list[str] | None,
    every: bool,  # noqa: FBT001 - the option
    command: str,
) -> dict[str, Any]:
    """Return the API's body; naming nothing is a mistake, not everything."""
    if not (ids or receiver or states or every):
        raise typer.BadParameter(f"say which batches to {command}: their ids, --receiver, --state or --all")
    if every and not states:
        states = ["dead", "expired"] if command == "retry" else ["dead", "expired", "withdrawn"]
    given = {"ids": ids, "receiver": receiver, "states": states}
    return {key: value for key, value in given.items() if value}
