"""Count the rooms of the house: folders and loose files, layers of imports, and circles.

Usage: .venv/bin/python -m scripts.tools.rooms

A room is a folder of `pocd` or `scripts`, or a file that lies loose beside these folders. Which room may import which
is held by import-linter (`pyproject.toml`); this counts what is there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import grimp

ROOTS = ("pocd", "scripts")


def main() -> None:
    """Print the counts."""
    graph = grimp.build_graph(*ROOTS, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    between: dict[str, set[str]] = {}
    for importer, imported in imports.items():
        room = _room(importer)
        between.setdefault(room, set()).update(map(_room, imported))
    circles = _circles(imports)
    rows = {
        "rooms (folders and loose files)": len(between),
        "layers of imports": _layers(between) if not _circles(between) else "rooms import one another in a circle",
        "imports inside a circle of modules": sum(
            name in circle for circle in circles for each in circle for name in imports[each]
        ),
        "circles of modules": len(circles),
        "circles of rooms": len(_circles(between)),
        "loose .py files in pocd/": sum(path.name != "__init__.py" for path in Path("pocd").glob("*.py")),
    }
    for name, count in rows.items():
        print(f"{name:36} {count}")
    for circle in circles:
        print(f"circle: {', '.join(sorted(circle))}")


def _room(module: str) -> str:
    """Return the room of a module: `pocd.chain` of `pocd.chain.evm`."""
    return ".".join(module.split(".")[:2])


def _circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of two and more that reach one another."""

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        left = [name]
        while left:
            new = imports[left.pop()] - found
            found |= new
            left.extend(new)
        return found

    reach = {name: reached(name) for name in imports}
    circles = {frozenset({name} | {other for other in reach[name] if name in reach[other]}) for name in imports}
    return [set(circle) for circle in circles if len(circle) > 1]


def _layers(between: dict[str, set[str]]) -> int:
    """Return how many rooms stand on one another at most."""

    @cache
    def height(room: str) -> int:
        return 1 + max((height(other) for other in between[room] - {room, *ROOTS}), default=0)

    return max(map(height, between))


if __name__ == "__main__":
    main()
