"""How torch's CPU threads wait for one another."""

from __future__ import annotations

# GNU OpenMP's threads spin while they wait for each other, by default for so long that one other busy
# process makes them tens of times slower (docs/architecture.md). It counts when torch is imported.
WAITING = {"GOMP_SPINCOUNT": "1000"}
