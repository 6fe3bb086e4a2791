"""Examples that `--help` shows beneath each command; a test checks that each can be parsed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

_OF_BLOCK = "\\\n      --block-hash 9F2E5C --public-key gonka1abc"
_ROOT = "--root \\\n      be5d2f80331bdfe7daf060a937ef2ce3b923b77b0d3e2310c772a63ae24f8bd7"

EXAMPLES = {
    "run": ["pocd run --config /etc/pocd/pocd.toml"],
    "demo": ["pocd demo", "pocd demo --blocks 3 --block-seconds 5"],
    "status": ["pocd status", "pocd status --json", "pocd status --url unix:///run/pocd/admin.sock"],
    "watch": ["pocd watch", "pocd watch --url http://10.0.0.7:8460 --token-file token", "pocd watch --interval 5"],
    "fleet": [
        "pocd fleet http://10.0.0.7:8460 http://10.0.0.8:8460 --token-file token",
        "pocd fleet --file hosts --interval 10",
        "pocd fleet --file hosts --json",
    ],
    "stop": ["pocd stop", "pocd stop --url unix:///run/pocd/admin.sock"],
    "resume": ["pocd resume"],
    "chain": ["pocd chain", "pocd chain --url http://node.example:8000 --json"],
    "devchain": [
        "pocd devchain",
        "pocd devchain --kind gonka --block-seconds 1",
        "pocd devchain --port 26658 --block-seconds 30 --seed test",
    ],
    "receiver": ["pocd receiver --store proofs.db", "pocd receiver --host 0.0.0.0 --secret-file secrets"],
    "relay": [
        "pocd relay --to http://api:9100",
        "pocd relay --to http://10.0.0.5:9100 --host 10.0.0.7 --store relay.db",
    ],
    "compute": [
        f"pocd compute --model bundled:tiny-qwen3 {_OF_BLOCK} --nonces 0:8",
        f"pocd compute --model Qwen/Qwen3-0.6B --device cuda {_OF_BLOCK} --nonces 0:1000,5000",
        f"pocd compute --model bundled:tiny-qwen3 --scheme poc4 --json {_OF_BLOCK} --nonces 0:8",
        f"pocd compute --model bundled:tiny-qwen3 --scheme artifacts --stronger-rng {_OF_BLOCK} --nonces 0:8",
    ],
    "calibrate": [
        "pocd calibrate --model bundled:tiny-qwen3 --rate 0.1",
        "pocd calibrate --model Qwen/Qwen3-0.6B --device cuda --blocks 20 --json",
    ],
    "audit": ["pocd audit --model bundled:tiny-qwen3", "pocd audit --model bundled:tiny-qwen3 --scheme poc3 --json"],
    "validate": [
        "pocd validate batch.json",
        "pocd validate batch.json --sample 100 --seed 9F2E5C",
        "pocd validate - --model bundled:tiny-qwen3 --r-target 1.4042",
    ],
    "commit": ["pocd commit artifacts.jsonl", "pocd commit -"],
    "prove": ["pocd prove artifacts.jsonl 3", "pocd prove artifacts.jsonl 3 11 19"],
    "verify": [f"pocd verify proofs.json --count 5 {_ROOT}", f"pocd verify - --count 5 {_ROOT}"],
    "check": ["pocd check", "pocd check --config /etc/pocd/pocd.toml --json"],
    "config check": ["pocd config check", "pocd config check --config /etc/pocd/pocd.toml"],
    "config show": ["pocd config show", "pocd config show --config /etc/pocd/pocd.toml"],
    "outbox list": ["pocd outbox list", "pocd outbox list --state dead --receiver main", "pocd outbox list --json"],
    "outbox show": ["pocd outbox show 5f1c0c6e", "pocd outbox show 5f1c0c6e --json"],
    "outbox retry": ["pocd outbox retry --all", "pocd outbox retry --receiver main --state expired"],
    "outbox backup": ["pocd outbox backup /var/lib/pocd/outbox-backup.db"],
    "outbox restore": ["pocd outbox restore /var/lib/pocd/outbox-backup.db"],
    "outbox purge": ["pocd outbox purge 5f1c0c6e", "pocd outbox purge --state withdrawn --yes"],
}


def add_examples(app: typer.Typer, group: str = "") -> None:
    """Put the examples beneath the help of the commands of `app`, and of its groups."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        if lines := EXAMPLES.get(f"{group}{name}"):
            command.epilog = "\b\n" + "\n  ".join(["Examples:", *lines])  # \b: the lines stay as they are
    for each in app.registered_groups:
        assert each.typer_instance is not None
        add_examples(each.typer_instance, f"{each.name} ")
