"""The tables of the store: the schema of this version, and the migrations from earlier ones.

The state of a batch is kept twice: per receiver in `deliveries`, and over all receivers in `batches`. The second
follows from the first, and the counts in `queues` and `stages` follow from both, by the triggers and by nothing else.
"""

from __future__ import annotations

VERSION = 5
APPLICATION_ID = 0x706F6364  # "pocd"

_META = "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT"

_TOTALS = "CREATE TABLE totals (checked INTEGER NOT NULL, valid INTEGER NOT NULL) STRICT"

# `replaced` says why the block of a round is no longer the chain's. `by_chain`: a block of the chain began it, so its
# hash is the chain's word. `callback` names the receiver that whoever asked for it by the API wants its batches at.
_ROUNDS = """
CREATE TABLE rounds (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, round TEXT NOT NULL,
  seen_at REAL NOT NULL, replaced TEXT, by_chain INTEGER NOT NULL DEFAULT 1, callback TEXT) STRICT"""

_ROUNDS_BY_HEIGHT = "CREATE INDEX rounds_by_height ON rounds (json_extract(round, '$.block_height'))"

# What one node has checked of one round; islands is a JSON list of [start, stop] above the cursor.
_PROGRESS = """
CREATE TABLE progress (round INTEGER NOT NULL REFERENCES rounds, node_id INTEGER NOT NULL,
  node_count INTEGER NOT NULL, cursor INTEGER NOT NULL, islands TEXT NOT NULL,
  checked INTEGER NOT NULL, valid INTEGER NOT NULL,
  PRIMARY KEY (round, node_id, node_count)) STRICT, WITHOUT ROWID"""

# Nonces that count and that no batch holds yet, as many in a row as were found in a span: `size` of them, as integers
# of 8 bytes, and their results, see `pocd.protocol.proof.Proofs`. All is little endian.
_PROOFS = """
CREATE TABLE proofs (number INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL REFERENCES rounds,
  node_id INTEGER NOT NULL, fingerprint TEXT, dtype TEXT, found_at REAL NOT NULL,
  size INTEGER NOT NULL, nonces BLOB NOT NULL, results BLOB NOT NULL) STRICT"""

# The body comes last: what stands behind a long one is slow to read. `bodies.py` says how it is stored. `round`
# is null in batches of version 2.
_BATCHES = """
CREATE TABLE batches (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, kind TEXT NOT NULL,
  round INTEGER REFERENCES rounds, nonces INTEGER NOT NULL, created_at REAL NOT NULL,
  state TEXT NOT NULL, changed_at REAL NOT NULL, body BLOB NOT NULL) STRICT"""

# What is known of each receiver: the last sequence number given, and how it answers. `url` only of those that came
# with a callback URL; the others' are in the configuration.
_RECEIVERS = """
CREATE TABLE receivers (name TEXT PRIMARY KEY, sequence INTEGER NOT NULL DEFAULT 0,
  failures INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0, error TEXT,
  parked_at REAL, parked_url TEXT, url TEXT) STRICT, WITHOUT ROWID"""

# One batch for one receiver. Attempts are all that were made; faults those that may be the batch's own fault.
_DELIVERIES = """
CREATE TABLE deliveries (receiver TEXT NOT NULL REFERENCES receivers,
  batch INTEGER NOT NULL REFERENCES batches ON DELETE CASCADE,
  sequence INTEGER NOT NULL, state TEXT NOT NULL, changed_at REAL NOT NULL,
  attempts INTEGER NOT NULL, faults INTEGER NOT NULL, reason TEXT,
  PRIMARY KEY (receiver, batch)) STRICT, WITHOUT ROWID"""

# Counts of deliveries by receiver and state, and of nonces by their batch's state. What was delivered or purged is
# counted for ever, also when its rows are gone.
_COUNTS = [
    """
CREATE TABLE queues (receiver TEXT NOT NULL, state TEXT NOT NULL, batches INTEGER NOT NULL,
  nonces INTEGER NOT NULL, PRIMARY KEY (receiver, state)) STRICT, WITHOUT ROWID""",
    "CREATE TABLE stages (state TEXT PRIMARY KEY, nonces INTEGER NOT NULL) STRICT, WITHOUT ROWID",
]

# Batches of others that we were asked to judge: what exactly was asked, and what came of it.
_VALIDATIONS = """
CREATE TABLE validations (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, asked_at REAL NOT NULL,
  state TEXT NOT NULL, changed_at REAL NOT NULL, reason TEXT, request BLOB NOT NULL, answer BLOB) STRICT"""

_VALIDATIONS_BY_STATE = "CREATE INDEX validations_by_state ON validations (state, number)"

# What orchestrators asked to be computed or judged, by a list of nonces; `callback` names the receiver of a verdict.
_JOBS = """
CREATE TABLE jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL,
  changed_at REAL NOT NULL, nonces INTEGER NOT NULL, callback TEXT, request BLOB NOT NULL, answer BLOB) STRICT"""

_JOBS_BY_STATE = "CREATE INDEX jobs_by_state ON jobs (state, number, nonces)"

_PROOFS_THAT_GO_TOGETHER = (
    "CREATE INDEX proofs_that_go_together ON proofs (round, node_id, fingerprint, dtype, number, size)"
)

_INDEXES = [
    "CREATE INDEX batches_by_id ON batches (id)",
    "CREATE INDEX batches_by_state ON batches (state, changed_at)",
    "CREATE INDEX batches_of_round ON batches (round, state)",
    "CREATE INDEX deliveries_in_order ON deliveries (receiver, state, sequence)",
    "CREATE INDEX deliveries_of_batch ON deliveries (batch, state)",
]

_BATCH_FOLLOWS = """
  UPDATE batches SET changed_at = new.changed_at, state = (
    SELECT CASE WHEN sum(state = 'pending') THEN 'pending' WHEN sum(state = 'dead') THEN 'dead'
      WHEN sum(state = 'expired') THEN 'expired' WHEN sum(state = 'withdrawn') THEN 'withdrawn'
      WHEN sum(state = 'purged') THEN 'purged' ELSE 'delivered' END
    FROM deliveries WHERE batch = new.batch) WHERE number = new.batch;"""

_COUNT_IN = """
  INSERT INTO queues SELECT new.receiver, new.state, 1, nonces FROM batches WHERE number = new.batch
    ON CONFLICT DO UPDATE SET batches = batches + 1, nonces = nonces + excluded.nonces;"""

# The funnel counts what we found ourselves, so not the nonces of validated batches.
_FUNNEL_TRIGGERS = [
    """
CREATE TRIGGER batch_formed AFTER INSERT ON batches WHEN new.kind = 'generated' BEGIN
  INSERT INTO stages VALUES (new.state, new.nonces) ON CONFLICT DO UPDATE SET nonces = nonces + new.nonces; END""",
    """
CREATE TRIGGER batch_moved AFTER UPDATE OF state ON batches
  WHEN old.state <> new.state AND new.kind = 'generated' BEGIN
  UPDATE stages SET nonces = nonces - new.nonces WHERE state = old.state;
  INSERT INTO stages VALUES (new.state, new.nonces) ON CONFLICT DO UPDATE SET nonces = nonces + new.nonces; END""",
]

_DELIVERY_TRIGGERS = [
    f"CREATE TRIGGER delivery_queued AFTER INSERT ON deliveries BEGIN{_COUNT_IN}{_BATCH_FOLLOWS} END",
    f"""
CREATE TRIGGER delivery_moved AFTER UPDATE OF state ON deliveries WHEN old.state <> new.state BEGIN
  UPDATE queues SET batches = batches - 1,
    nonces = nonces - (SELECT nonces FROM batches WHERE number = new.batch)
    WHERE receiver = old.receiver AND state = old.state;{_COUNT_IN}{_BATCH_FOLLOWS} END""",  # noqa: S608 - made of constants
]

SCHEMA: list[str] = [
    _META,
    _TOTALS,
    "INSERT INTO totals VALUES (0, 0)",
    _ROUNDS,
    _ROUNDS_BY_HEIGHT,
    _PROGRESS,
    _PROOFS,
    _BATCHES,
    _RECEIVERS,
    _DELIVERIES,
    _VALIDATIONS,
    _JOBS,
    *_COUNTS,
    *_INDEXES,
    _PROOFS_THAT_GO_TOGETHER,
    _VALIDATIONS_BY_STATE,
    _JOBS_BY_STATE,
    *_DELIVERY_TRIGGERS,
    *_FUNNEL_TRIGGERS,
]

MIGRATIONS: dict[int, list[str]] = {
    # Proofs of version 1 do not say which weights they are of.
    1: ["ALTER TABLE proofs ADD COLUMN fingerprint TEXT"],
    # Version 2 knew only pending and delivered, kept the wait in the delivery, and did not say whose round a batch is.
    2: [
        "ALTER TABLE rounds ADD COLUMN replaced TEXT",
        _ROUNDS_BY_HEIGHT,
        "ALTER TABLE totals DROP COLUMN stored",
        "ALTER TABLE totals DROP COLUMN delivered",
        "ALTER TABLE batches RENAME TO old_batches",
        "ALTER TABLE deliveries RENAME TO old_deliveries",
        "DROP INDEX pending",
        "DROP INDEX pending_of_batch",
        _BATCHES,
        _RECEIVERS.replace(", url TEXT", ""),
        _DELIVERIES,
        *_COUNTS,
        *_INDEXES,
        *_DELIVERY_TRIGGERS,
        *_FUNNEL_TRIGGERS,
        """
INSERT INTO batches SELECT number, id, kind, NULL, nonces, created_at, 'pending', created_at, body
  FROM old_batches ORDER BY number""",
        "INSERT INTO receivers (name, sequence) SELECT receiver, max(batch) FROM old_deliveries GROUP BY receiver",
        """
INSERT INTO deliveries SELECT receiver, batch, batch, iif(delivered_at IS NULL, 'pending', 'delivered'),
    coalesce(delivered_at, created_at), attempts, 0, last_error
  FROM old_deliveries JOIN old_batches ON number = batch ORDER BY receiver, batch""",
        """
UPDATE receivers SET (failures, next_at, error) = (
    SELECT attempts, next_at, last_error FROM old_deliveries
      WHERE receiver = name AND delivered_at IS NULL ORDER BY batch LIMIT 1)
  WHERE name IN (SELECT receiver FROM old_deliveries WHERE delivered_at IS NULL)""",
        "DROP TABLE old_deliveries",
        "DROP TABLE old_batches",
    ],
    # Version 3 knew no API rounds, no callback URLs and no validations; being stopped was all there was to remember.
    3: [
        "ALTER TABLE rounds ADD COLUMN by_chain INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE rounds ADD COLUMN callback TEXT",
        "ALTER TABLE proofs ADD COLUMN dtype TEXT",
        "ALTER TABLE receivers ADD COLUMN url TEXT",
        "DROP INDEX IF EXISTS proofs_that_go_together",
        _VALIDATIONS,
        _VALIDATIONS_BY_STATE,
        "DROP TRIGGER batch_formed",
        "DROP TRIGGER batch_moved",
        *_FUNNEL_TRIGGERS,
        """INSERT INTO meta SELECT 'control', '{"mode":"STOPPED","asked":null}' FROM meta WHERE key = 'paused'""",
        "DELETE FROM meta WHERE key = 'paused'",
    ],
    # Version 4 had a row for each proof, and no jobs.
    4: [
        "DROP INDEX IF EXISTS proofs_that_go_together",
        "ALTER TABLE proofs RENAME TO old_proofs",
        _PROOFS,
        """
INSERT INTO proofs SELECT number, round, node_id, fingerprint, dtype, found_at, 1, packed('<q', nonce),
  packed('<d', distance) FROM old_proofs ORDER BY number""",
        "DROP TABLE old_proofs",
        _PROOFS_THAT_GO_TOGETHER,
        _JOBS,
        _JOBS_BY_STATE,
    ],
}
"""Statements that bring a store of each version to the next; `packed` is Python's `struct.pack`."""
