"""The status, the outbox and a verdict as text for people."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from pocd.admin.text import age, card_text, epoch_text, funnel_text, local_time, rates_text, speed, valid_rate_text
from pocd.observe.mask import clean, escape_json

if TYPE_CHECKING:
    from collections.abc import Iterable


def as_json(body: dict[str, Any]) -> str:
    """Return an answer of the API as indented JSON."""
    return escape_json(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())


def _lines(rows: Iterable[tuple[str, str]]) -> str:
    """Return a line for each label and its text."""
    return "\n".join(f"{label:10} {clean(text)}" for label, text in rows)


def _receiver(receiver: dict[str, Any]) -> str:
    """Describe one receiver's queue and how it answers."""
    counts = [f"{receiver['delivered_batches']} batches delivered", f"{receiver['pending_batches']} pending"]
    counts += [
        f"{receiver[f'{state}_batches']} {state}"
        for state in ("dead", "expired", "withdrawn", "purged")
        if receiver[f"{state}_batches"]
    ]
    text = f"{clean(receiver['name'])}: {', '.join(counts)}"
    if receiver["url"] is None:
        return f"{text}; no longer configured, its queue is kept"
    if receiver["last_error"]:
        text += f"; last error: {clean(receiver['last_error'])}"
    if receiver["next_attempt_seconds"] is not None and not receiver["parked"]:
        text += f", asked again in {receiver['next_attempt_seconds']:.0f} s"
    return text


def outbox_as_text(body: dict[str, Any]) -> str:
    """Return the lines that `pocd outbox list` prints."""
    lines = [_receiver(receiver) for receiver in body["receivers"]]
    if body["batches"]:
        lines += ["", _LETTER.format("receiver", "seq", "batch", "state", "nonces", "attempts", "age", "reason")]
    lines += [_letter(letter) for letter in body["batches"]]
    if body["next"]:
        lines.append(f"more: --after {body['next']}")
    return "\n".join(lines) or "no receiver and no batch yet"


_LETTER = "{:12} {:>6} {:32} {:9} {:>6} {:>8} {:>6}  {}"


def _letter(letter: dict[str, Any]) -> str:
    line = _LETTER.format(
        letter["receiver"],
        letter["sequence"],
        letter["id"],
        letter["state"],
        letter["nonces"],
        letter["attempts"],
        age(letter["age_seconds"]),
        letter["reason"] or "",
    )
    return clean(line).rstrip()


def batch_as_text(body: dict[str, Any]) -> str:
    """Return the lines that `pocd outbox show` prints."""
    lines = [_LETTER.format("receiver", "seq", "batch", "state", "nonces", "attempts", "age", "reason")]
    return "\n".join([*lines, *map(_letter, body["deliveries"]), "", as_json(body["batch"])])


def _worker(worker: dict[str, Any]) -> str:
    """Describe one worker: its device, its rate, and its GPUs."""
    text = f"{worker['number']}: {worker['device']}" + (f" on {worker['node']}" if worker.get("node") else "")
    if worker["ready"]:
        text += f", {worker['execution']}, {speed(worker['computed_per_second_1m'])}"
    else:
        text += ", not ready" + (f": {worker['stage']}" if worker["stage"] else "")
    return "; ".join([text, *map(card_text, worker["cards"])])


def _machine(machine: dict[str, Any]) -> str:
    """Describe one machine of a cluster: how many workers it runs, and their rate."""
    counts = f"{machine['ready']} of {machine['workers']} workers ready"
    return f"{machine['node']} ({machine['address']}), {counts}, {speed(machine['computed_per_second_1m'])}"


_SUSPICIONS = {
    "impossible_claims": "what no honest miner claims (no finite numbers, or not from 0 to below r_target): "
    "{impossible_claims} nonces",
    "duplicates": "repeated nonces: {duplicates} entries; each nonce counts once",
    "sparse": "few of the node's nonces (density {density:.2g}): the others may have been skipped without computing; "
    "a low valid rate and a late batch of a long round look the same",
    "shifted": "claims further than the tolerance from what was recomputed: {shifted} nonces",
    "other_node": "some nonces are not those of node {node_id} of {node_count}, which the batch says it is",
}


def verdict_as_text(body: dict[str, Any]) -> str:
    """Return the lines that `pocd validate` prints."""
    which = "all distinct ones" if body["sample"] is None else f"drawn by {body['seed']!r} from {body['n_batch']}"
    largest = body["largest_difference"]
    difference = "no claim is a number" if largest is None else f"{largest:.2g} at most from claimed to recomputed"
    chance, threshold = f"{body['probability_honest']:.2g}", f"{body['fraud_threshold']:g}"
    mixture = body.get("mixture")
    if body["fraud_detected"] and body["probability_honest"] < body["fraud_threshold"]:
        verdict = f"FRAUD: {chance} < {threshold}"
    elif mixture is not None and not mixture["decidable"]:
        verdict = "UNDECIDABLE: a router's choice may turn in too many nonces, or the nonces are too few"
    elif body.get("vectors") is None:
        verdict = f"honest: {chance} ≥ {threshold}"
    else:
        verdict = {"fraud": "FRAUD", "honest": "honest"}.get(body["verdict"], "UNDECIDABLE") + ", by the differences"
    target = f"r_target {body['r_target']}, " if body.get("r_target") is not None else ""
    rows = [
        ("block", f"{body['block_height']} {_quoted(body['block_hash'])}"),
        ("miner", f"{_quoted(body['public_key'])}, node {body['node_id']} of {body['node_count']}"),
        ("held to", f"{target}scheme {body['scheme']}, {body['dtype']}, {body['seq_len']} positions"),
        ("weights", f"{body['model_fingerprint']} of {_quoted(body['model'])}"),
        ("recomputed", f"{body['n']} nonces, {which}; invalid: {body['n_invalid']}"),
        ("difference", f"{difference}; tolerance {body['tolerance']:.2g}"),
        *(("suspicious", _SUSPICIONS.get(word, word).format(**body)) for word in body["suspicions"]),
        *_mixture(mixture, body),
        ("chance", f"{chance} that an honest miner has so many {_counted(mixture, body)}"),
        *_differences(body["differences"]),
        ("verdict", verdict),
        *_network(body),
    ]
    return _lines(rows)


def _network(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the live network's verdict, where it was asked for."""
    if "network" not in body:
        return []
    found = body["network"]
    if found is None:
        return [("network", "no verdict: too many nonces have no finite vector here")]
    sign, word = ("<", "FRAUD") if found["fraud_detected"] else ("≥", "honest")
    p_value, threshold = found["p_value"], found["fraud_threshold"]
    text = f"{word}: {found['n_mismatch']} of {found['n_total']} are too far; {p_value:.2g} {sign} {threshold:g}"
    if (other := found.get("fraud_by_p_value_threshold")) is not None:
        text += f"; by p_value_threshold {found['p_value_threshold']:g} {'FRAUD' if other else 'honest'}"
    return [("network", text)]


def _counted(mixture: dict[str, Any] | None, body: dict[str, Any]) -> str:
    """Return what of a batch is counted, and how probable each is."""
    at = f"at {body['mismatch']:g} each"
    if mixture is None:
        return f"bad nonces, or more, {at}"
    if not mixture["decidable"]:
        return f"impossible claims, or more, {at}; nothing else is counted"
    return f"bad nonces, or more, {at} that is not near, and at {mixture['mismatch']:.2g} each of all"


def _mixture(found: dict[str, Any] | None, body: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a mixture's routers leave of the verdict."""
    if found is None:
        return []
    near = f"{found['near']} of {body['n']} nonces are near another choice of experts; of these invalid:"
    quarter = f"a quarter of bad nonces would be an honest miner's by {found['p_quarter']:.2g}"
    return [("routers", f"{near} {found['near_invalid']}; {quarter}")]


def _differences(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return what the verdict by differences says."""
    if found is None:
        return []
    chance, blank = (f"{found[name]:.2g}" for name in ("probability_honest", "probability_blank"))
    said = {
        "fraud": f"they are no honest miner's: {chance} < {found['threshold']:g}",
        "honest": f"as an honest miner's: {chance} ≥ {found['threshold']:g}",
        "undecidable": f"they tell nothing: claims without a computation would pass as well, by {blank}",
    }
    return [("by size", f"of the differences, allowance {found['allowance']:g}: {said[found['result']]}")]


def _quoted(text: str) -> str:
    """Return text from outside, cut to fit a line."""
    return f"{text[:64]}…" if len(text) > 64 else text


def _block_time(chain: dict[str, Any]) -> str:
    if chain["block_time"] is None:
        return ""
    return (
        f", its block of {local_time(datetime.fromisoformat(chain['block_time']).timestamp(), '%Y-%m-%d %H:%M:%S %Z')}"
    )


def as_text(body: dict[str, Any]) -> str:
    """Return the lines that `pocd status` prints."""
    funnel, rates, chain, worker, round_ = (body[key] for key in ("funnel", "rates", "chain", "worker", "round"))
    mode = body["control"]["mode"]
    rows = [
        ("state", body["state"] if mode in {"FOLLOWING", body["state"]} else f"{body['state']}, mode {mode}"),
        ("chain", f"{chain['chain_id'] or '–'}, height {chain['height'] or '–'}{_block_time(chain)}"),
    ]
    if epoch := chain.get("epoch"):
        rows.append(("epoch", epoch_text(epoch)))
    if round_:
        block = f"block {round_['block_height']} {round_['block_hash'][:16]}…"
        asked = "" if mode in {"FOLLOWING", "STOPPED"} else "asked for by the API: "
        rows += [
            ("round", f"{asked}{block}, {round_['scheme']} on {round_['model']}"),
            ("valid rate", valid_rate_text(round_)),
        ]
    device = "{device}, {dtype}, batches of {batch_size}".format(**worker) if "device" in worker else "not ready"
    rows += [
        ("rate", rates_text(rates)),
        ("funnel", funnel_text(funnel)),
        ("worker", f"{device}, {worker['restarts']} restarts, {worker['refused_batches']} batches refused"),
        *(("", _worker(each)) for each in body["workers"]),
        *(("machine", _machine(each)) for each in body.get("machines", [])),
    ]
    if "fingerprint" in worker:
        rows.append(("weights", worker["fingerprint"]))
    if broken := worker.get("non_finite_nonces"):
        rows.append(("NaN", f"{broken:,} nonces without a result"))
    if worker["last_refusal"]:
        rows.append(("refused", worker["last_refusal"]))
    rows += [("receiver", _receiver(receiver)) for receiver in body["receivers"]]
    rows += [("alarm", f"{alarm['part']}: {alarm['reason']}") for alarm in body["alarms"]]
    rows += [("problem", f"{problem['part']}: {problem['reason']}") for problem in body["problems"]]
    return _lines(rows)
