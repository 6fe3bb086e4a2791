-- A store as version 2 made it: one round; two batches, the first delivered to one receiver of two; one proof in no batch.
PRAGMA application_id = 1886348132;
PRAGMA user_version = 2;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE totals (checked INTEGER NOT NULL, valid INTEGER NOT NULL, stored INTEGER NOT NULL,
  delivered INTEGER NOT NULL) STRICT;
INSERT INTO totals VALUES (8, 4, 3, 0);
CREATE TABLE rounds (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, round TEXT NOT NULL,
  seen_at REAL NOT NULL) STRICT;
INSERT INTO rounds VALUES (1, '6a9b8ca9e5ea7d73b9ba1e3b4b1a8e9c', '{"block_hash":"AB","block_height":10,"public_key":"miner","r_target":1.4,"scheme":"poc2","model":"tiny","seq_len":16}', 1700000000.0);
CREATE TABLE progress (round INTEGER NOT NULL REFERENCES rounds, node_id INTEGER NOT NULL,
  node_count INTEGER NOT NULL, cursor INTEGER NOT NULL, islands TEXT NOT NULL,
  checked INTEGER NOT NULL, valid INTEGER NOT NULL,
  PRIMARY KEY (round, node_id, node_count)) STRICT, WITHOUT ROWID;
INSERT INTO progress VALUES (1, 1, 3, 8, '[]', 8, 4);
CREATE TABLE proofs (number INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL REFERENCES rounds,
  node_id INTEGER NOT NULL, nonce INTEGER NOT NULL, distance REAL NOT NULL, found_at REAL NOT NULL,
  fingerprint TEXT) STRICT;
INSERT INTO proofs VALUES (4, 1, 1, 10, 1.25, 1700000000.0, 'f00d');
CREATE TABLE batches (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, kind TEXT NOT NULL,
  nonces INTEGER NOT NULL, body BLOB NOT NULL, created_at REAL NOT NULL) STRICT;
INSERT INTO batches VALUES (1, 'first', 'generated', 1, CAST('{"nonces":[1]}' AS BLOB), 1700000000.0);
INSERT INTO batches VALUES (2, 'second', 'generated', 2, CAST('{"nonces":[4,7]}' AS BLOB), 1700000001.0);
CREATE TABLE deliveries (batch INTEGER NOT NULL REFERENCES batches, receiver TEXT NOT NULL,
  attempts INTEGER NOT NULL, next_at REAL NOT NULL, last_error TEXT, delivered_at REAL,
  PRIMARY KEY (receiver, batch)) STRICT, WITHOUT ROWID;
INSERT INTO deliveries VALUES (1, 'main', 3, 1700000001.0, 'HTTP 503', NULL);
INSERT INTO deliveries VALUES (2, 'main', 0, 1700000001.0, NULL, NULL);
INSERT INTO deliveries VALUES (1, 'other', 1, 1700000000.0, NULL, 1700000002.0);
INSERT INTO deliveries VALUES (2, 'other', 2, 1700000009.0, 'HTTP 500', NULL);
CREATE INDEX pending ON deliveries (receiver, batch) WHERE delivered_at IS NULL;
CREATE INDEX pending_of_batch ON deliveries (batch) WHERE delivered_at IS NULL;
