"""The table of docs/models.md: which families run, by which decoder, and why others are refused.

python -m tests.support.model_table
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from pocd.compute.model import Model, adapt
from pocd.protocol.errors import ModelError
from tests.support.family_models import FAMILIES
from tests.support.other_models import OTHERS, build

if TYPE_CHECKING:
    from collections.abc import Iterator


def row(case: str, causal: Any, found: Model | ModelError) -> str:  # noqa: ANN401 - transformers gives its classes no common type
    """Return the table's line of a family: how it runs, or why it does not."""
    if isinstance(found, Model):
        outcome = found.decoder.kind + (", all positions" if found.by_layers.carries_all else "")
    else:
        reason = str(found).partition(f"({type(causal).__name__})")[2].lstrip(":, ")
        outcome = "refused: " + re.sub(r"; looked for .*| as found at .*", "", reason)
    return f"| {case} | `{type(causal).__name__}` | {outcome} |"


def rows() -> Iterator[str]:
    """Give the lines of all families that the tests build."""
    causals = {name: family.build() for name, family in FAMILIES.items()}
    causals |= {name: build(kind, **config) for name, (kind, _, config) in OTHERS.items()}
    for case in sorted(causals):
        try:
            yield row(case, causals[case], adapt(causals[case], name="small"))
        except ModelError as error:
            yield row(case, causals[case], error)


if __name__ == "__main__":
    for line in ("| family, and what is special | class of transformers | decoder |", "|---|---|---|", *rows()):
        sys.stdout.write(f"{line}\n")
