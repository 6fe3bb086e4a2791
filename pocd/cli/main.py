"""The command line. Commands import what they need when they run, so that each starts fast."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pocd import __version__
from pocd.cli.api import ConfigOption, TokenOption, UrlOption, call_api, echo
from pocd.cli.chain import chain
from pocd.cli.check import check
from pocd.cli.commitment import commit, prove, verify_proofs
from pocd.cli.compute import audit, calibrate, compute
from pocd.cli.examples import add_examples
from pocd.cli.fleet import fleet
from pocd.cli.outbox import app as outbox_app
from pocd.cli.validate import validate
from pocd.cli.watch import watch
from pocd.config.model import check_model
from pocd.config.settings import DEFAULT_PATH, ConfigError, foreign_variables, load
from pocd.observe.journal import goes_to_journal, marked
from pocd.observe.lines import writer_to
from pocd.observe.mask import clean, mask_credentials
from pocd.process import EXIT_CRASH, EndedError, exit_status, importing, release_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from structlog.typing import FilteringBoundLogger

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
app.add_typer(config_app, name="config")
app.add_typer(outbox_app, name="outbox")
for command in (check, chain, watch, fleet, compute, calibrate, audit, validate, commit, prove):
    app.command()(command)
app.command("verify")(verify_proofs)

TELL_SECONDS = 2.0  # for the reader of standard error to take why a command ends

HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when a command fails.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Mine proofs of compute, and deliver every one of them."""
    context.obj = debug
    if context.invoked_subcommand != "run":  # which has more to import, and says itself what a signal does
        release_signals()
    if version:
        echo(f"pocd {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; every failure is one line on standard error and an exit status."""
    debug = "--debug" in sys.argv[1:2]
    try:
        code = app(prog_name="pocd", standalone_mode=False)
    except typer.TyperException as error:
        code = _fail(2, error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except ConfigError as error:
        code = _fail(exit_status(error), str(error))
    except EndedError as error:
        code = _fail(error.code, str(error))
    except Exception as error:  # noqa: BLE001 - the last place where an error can be told in one line
        if debug:
            _tell(clean(mask_credentials(traceback.format_exc()), keep="\n"))
        code = _fail(EXIT_CRASH, f"{type(error).__name__}: {error} (pocd --debug … shows where)")
    sys.exit(code)


def _fail(code: int, message: str) -> int:
    line = f"pocd: {clean(mask_credentials(message.replace(chr(10), ' ')))}"
    _tell(f"{marked(line, 'error') if goes_to_journal(2) else line}\n")
    return code


def _tell(text: str) -> None:
    """Write to standard error, whose reader may have stalled or gone: that keeps no process from its end."""
    writer = writer_to(sys.stderr)
    writer.put(text.encode(sys.stderr.encoding or "utf-8", "backslashreplace"))
    writer.flush(TELL_SECONDS)


def _run_until_signal(service: Coroutine[Any, Any, None]) -> None:
    """Run a program that ends at SIGINT or SIGTERM, in good order."""

    async def until_signal() -> None:
        task = asyncio.ensure_future(service)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(until_signal())


def _announce(log: FilteringBoundLogger, what: str) -> Callable[[str], None]:
    return lambda url: log.info("listens", action="listening", what=what, url=url)


@app.command()
def run(config: ConfigOption = DEFAULT_PATH) -> None:
    """Run the daemon."""
    with importing():
        import resource

        import uvloop

        from pocd.daemon import daemon
        from pocd.observe import logs
        from pocd.observe.notify import Notifier

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the daemon heeds it: its default is a silent end
    release_signals()
    os.umask(os.umask(0) | 0o027)  # what is made here is nobody's but ours, whatever the caller allows
    settings = load(config)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # many callers leave files for everything else
    log = logs.configure(settings.log.level, settings.log.format)
    log.info("pocd starts", action="start", version=__version__, config=str(config), pid=os.getpid())
    if others := foreign_variables(os.environ):
        log.warning("these variables set nothing, ours are POCD_SECTION__KEY", action="environment", names=others)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(daemon.run(settings, config, log=log, notifier=Notifier.from_environment(os.environ)))
    finally:
        logs.flush()  # what was logged comes before the line that says why it ended


@app.command()
def demo(
    *,
    blocks: Annotated[int, typer.Option(help="End after this many blocks; 0 mines until Ctrl-C.", min=0)] = 0,
    block_seconds: Annotated[float, typer.Option(help="Seconds between blocks.", min=1)] = 8.0,
    model: Annotated[str, typer.Option(help="A bundled model.")] = "bundled:tiny-qwen3",
    folder: Annotated[Path, typer.Option(help="Emptied at the start; the last run stays there.")] = Path(".demo"),
) -> None:
    """Run a demo: a development chain, a receiver and the daemon, each a process of its own."""
    from pocd.dev import demo as program

    plan = program.DemoPlan(blocks=blocks, block_seconds=block_seconds, model=model, folder=folder.resolve())
    raise typer.Exit(asyncio.run(program.run(plan)))


@app.command()
def status(
    *,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the API's whole answer.")] = False,
) -> None:
    """Show what the daemon is doing."""
    from pocd.cli import report

    body = call_api("GET", "/api/v1/pow/status", config, url, token_file)
    echo(report.as_json(body) if as_json else report.as_text(body))


@app.command()
def stop(config: ConfigOption = DEFAULT_PATH, url: UrlOption = None, token_file: TokenOption = None) -> None:
    """Stop mining until `pocd resume`, also across restarts. The daemon runs on and delivers."""
    body = call_api("POST", "/api/v1/pow/stop", config, url, token_file)
    echo(f"mining is {body['state']}")


@app.command()
def resume(config: ConfigOption = DEFAULT_PATH, url: UrlOption = None, token_file: TokenOption = None) -> None:
    """Go on mining."""
    body = call_api("POST", "/api/v1/pow/resume", config, url, token_file)
    echo(f"mining is {body['state']}")


@app.command()
def devchain(
    *,
    host: HostOption = "127.0.0.1",
    port: PortOption = 26657,
    seed: Annotated[str, typer.Option(help="Seed of the block hashes.")] = "pocd",
    block_seconds: Annotated[float, typer.Option(help="Seconds between blocks.", min=0.1)] = 5.0,
    chain_id: Annotated[str, typer.Option(help="The network's name.")] = "pocd-dev",
    genesis: Annotated[float | None, typer.Option(help="Unix time of block 1. Default: now.")] = None,
    kind: Annotated[Literal["cometbft", "gonka"], typer.Option(help="What the chain is like.")] = "cometbft",
    model: Annotated[str, typer.Option(help="Name of the network's one model, of kind gonka.")] = "bundled:tiny-qwen3",
    seq_len: Annotated[int, typer.Option(help="Number of positions, of kind gonka.", min=1)] = 32,
    schemes: Annotated[
        bool, typer.Option("--schemes", help="Tell a model's parameters in a list of schemes, of kind gonka.")
    ] = False,
) -> None:
    """Run a development chain that speaks CometBFT's RPC; of kind gonka with the live network's epochs besides.

    A confirmation round of kind gonka is announced by POST /confirm.
    """
    from pocd.dev import chain as program
    from pocd.dev import epochs
    from pocd.observe import logs

    log = logs.configure("info", "auto")
    started = time.time() if genesis is None else genesis
    blocks = program.DevChain(seed=seed, block_seconds=block_seconds, genesis=started, chain_id=chain_id)
    if kind == "gonka":
        served = epochs.application(epochs.EpochChain(blocks, model, seq_len, in_schemes=schemes))
    else:
        served = program.application(blocks)
    with _port_errors(host, port):
        _run_until_signal(program.serve(served, host, port, _announce(log, "development chain")))


@app.command()
def receiver(
    *,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8470,
    store: Annotated[Path, typer.Option(help="The SQLite file that keeps the batches.")] = Path("receiver.db"),
    secret_file: Annotated[
        Path | None, typer.Option(help="Secrets (whsec_…), one a line; then unsigned is refused.")
    ] = None,
) -> None:
    """Run the reference receiver of proofs."""
    from pocd.http.webhooks import SecretError, WebhookKeys
    from pocd.observe import logs
    from pocd.receiver import app as program
    from pocd.receiver.store import ReceiverStoreError

    log = logs.configure("info", "auto")
    try:
        keys = WebhookKeys.from_file(secret_file) if secret_file else None
        with _port_errors(host, port):
            announce = _announce(log, "receiver")
            _run_until_signal(program.serve(host=host, port=port, path=store, keys=keys, on_started=announce))
    except (SecretError, ReceiverStoreError) as error:
        raise ConfigError(str(error)) from error


@app.command()
def relay(
    *,
    to: Annotated[str, typer.Option(help="The orchestrator: what comes for PATH goes to {to}PATH.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 9101,
    store: Annotated[Path, typer.Option(help="The SQLite file that keeps the callbacks.")] = Path("relay.db"),
    generated_seconds: Annotated[float, typer.Option(help="How long artifacts are of use.", min=1)] = 240.0,
    validated_seconds: Annotated[float, typer.Option(help="How long a verdict is of use.", min=1)] = 1500.0,
) -> None:
    """Run a relay that keeps a proof server's callbacks until the orchestrator has taken them."""
    from pocd.http.urls import unusable
    from pocd.observe import logs
    from pocd.relay import app as program

    log = logs.configure("info", "auto")
    if reason := unusable(to):
        raise ConfigError(f"--to {reason}")
    plan = program.RelayPlan(
        to=to,
        host=host,
        port=port,
        store=store,
        windows={"generated": generated_seconds, "validated": validated_seconds},
    )
    with _port_errors(host, port):
        _run_until_signal(program.serve(plan, log, _announce(log, "relay")))


@contextlib.contextmanager
def _port_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port"
        raise EndedError(exit_status(error), message) from error


@config_app.command("check")
def config_check(config: ConfigOption = DEFAULT_PATH) -> None:
    """Check the configuration and the files that it names, as a reload does, without starting anything."""
    from pocd.config.secrets import check_secrets, unit_of

    settings = load(config)
    check_model(settings)
    unseen = check_secrets(settings, config)
    echo(
        f"{config}: good" + (f", but for {', '.join(unseen)}, which only {unit_of(config)} can read" if unseen else "")
    )


@config_app.command("show")
def config_show(config: ConfigOption = DEFAULT_PATH) -> None:
    """Print the configuration in effect, as TOML: file, environment and defaults together."""
    from pocd.config.shown import to_toml

    echo(to_toml(load(config)).rstrip("\n"))


add_examples(app)
