-- A store as version 4 made it: one round; one batch of two, delivered to one receiver of two; two proofs in no batch, of two dtypes.
PRAGMA application_id = 1886348132;
PRAGMA user_version = 4;
BEGIN TRANSACTION;
CREATE TABLE batches (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, kind TEXT NOT NULL,
  round INTEGER REFERENCES rounds, nonces INTEGER NOT NULL, created_at REAL NOT NULL,
  state TEXT NOT NULL, changed_at REAL NOT NULL, body BLOB NOT NULL) STRICT;
INSERT INTO "batches" VALUES(1,'c5929d3213fdfaf25becefd9fdc02f65','generated',1,2,1700000000.0,'pending',1700000001.0,X'7B2262617463685F6964223A226335393239643332313366646661663235626563656664396664633032663635222C22626C6F636B5F68617368223A224142222C22626C6F636B5F686569676874223A31302C2264697374223A5B312E3030312C312E3030345D2C226474797065223A22666C6F61743332222C226D6F64656C223A2274696E79222C226D6F64656C5F66696E6765727072696E74223A2266303064222C226E6F64655F6964223A312C226E6F6E636573223A5B312C345D2C227075626C69635F6B6579223A226D696E6572222C22725F746172676574223A312E342C22736368656D65223A22706F6332222C227365715F6C656E223A31367D');
CREATE TABLE deliveries (receiver TEXT NOT NULL REFERENCES receivers,
  batch INTEGER NOT NULL REFERENCES batches ON DELETE CASCADE,
  sequence INTEGER NOT NULL, state TEXT NOT NULL, changed_at REAL NOT NULL,
  attempts INTEGER NOT NULL, faults INTEGER NOT NULL, reason TEXT,
  PRIMARY KEY (receiver, batch)) STRICT, WITHOUT ROWID;
INSERT INTO "deliveries" VALUES('main',1,1,'pending',1700000000.0,0,0,NULL);
INSERT INTO "deliveries" VALUES('other',1,1,'delivered',1700000001.0,1,0,NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
INSERT INTO "meta" VALUES('epoch','ff44cb3d31e13fbe1eed9be6fec85fe9');
INSERT INTO "meta" VALUES('commits','5');
CREATE TABLE progress (round INTEGER NOT NULL REFERENCES rounds, node_id INTEGER NOT NULL,
  node_count INTEGER NOT NULL, cursor INTEGER NOT NULL, islands TEXT NOT NULL,
  checked INTEGER NOT NULL, valid INTEGER NOT NULL,
  PRIMARY KEY (round, node_id, node_count)) STRICT, WITHOUT ROWID;
INSERT INTO "progress" VALUES(1,1,3,9,'[]',9,4);
CREATE TABLE proofs (number INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL REFERENCES rounds,
  node_id INTEGER NOT NULL, nonce INTEGER NOT NULL, distance REAL NOT NULL, found_at REAL NOT NULL,
  fingerprint TEXT, dtype TEXT) STRICT;
INSERT INTO "proofs" VALUES(3,1,1,13,1.013,1700000000.0,'f00d','float32');
INSERT INTO "proofs" VALUES(4,1,1,25,1.25,1700000000.0,'f00d','bfloat16');
CREATE TABLE queues (receiver TEXT NOT NULL, state TEXT NOT NULL, batches INTEGER NOT NULL,
  nonces INTEGER NOT NULL, PRIMARY KEY (receiver, state)) STRICT, WITHOUT ROWID;
INSERT INTO "queues" VALUES('main','pending',1,2);
INSERT INTO "queues" VALUES('other','delivered',1,2);
INSERT INTO "queues" VALUES('other','pending',0,0);
CREATE TABLE receivers (name TEXT PRIMARY KEY, sequence INTEGER NOT NULL DEFAULT 0,
  failures INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0, error TEXT,
  parked_at REAL, parked_url TEXT, url TEXT) STRICT, WITHOUT ROWID;
INSERT INTO "receivers" VALUES('main',1,0,0.0,NULL,NULL,NULL,NULL);
INSERT INTO "receivers" VALUES('other',1,0,0.0,NULL,NULL,NULL,NULL);
CREATE TABLE rounds (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, round TEXT NOT NULL,
  seen_at REAL NOT NULL, replaced TEXT, by_chain INTEGER NOT NULL DEFAULT 1, callback TEXT) STRICT;
INSERT INTO "rounds" VALUES(1,'f51f2845c48f54b82d516d7abf076dc2','{"block_hash":"AB","block_height":10,"public_key":"miner","r_target":1.4,"scheme":"poc2","model":"tiny","seq_len":16}',1700000000.0,NULL,1,NULL);
CREATE TABLE stages (state TEXT PRIMARY KEY, nonces INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO "stages" VALUES('pending',2);
CREATE TABLE totals (checked INTEGER NOT NULL, valid INTEGER NOT NULL) STRICT;
INSERT INTO "totals" VALUES(9,4);
CREATE TABLE validations (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, asked_at REAL NOT NULL,
  state TEXT NOT NULL, changed_at REAL NOT NULL, reason TEXT, request BLOB NOT NULL, answer BLOB) STRICT;
CREATE INDEX rounds_by_height ON rounds (json_extract(round, '$.block_height'));
CREATE INDEX batches_by_id ON batches (id);
CREATE INDEX batches_by_state ON batches (state, changed_at);
CREATE INDEX batches_of_round ON batches (round, state);
CREATE INDEX deliveries_in_order ON deliveries (receiver, state, sequence);
CREATE INDEX deliveries_of_batch ON deliveries (batch, state);
CREATE INDEX proofs_that_go_together ON proofs (round, node_id, fingerprint, dtype);
CREATE INDEX validations_by_state ON validations (state, number);
CREATE TRIGGER delivery_queued AFTER INSERT ON deliveries BEGIN
  INSERT INTO queues SELECT new.receiver, new.state, 1, nonces FROM batches WHERE number = new.batch
    ON CONFLICT DO UPDATE SET batches = batches + 1, nonces = nonces + excluded.nonces;
  UPDATE batches SET changed_at = new.changed_at, state = (
    SELECT CASE WHEN sum(state = 'pending') THEN 'pending' WHEN sum(state = 'dead') THEN 'dead'
      WHEN sum(state = 'expired') THEN 'expired' WHEN sum(state = 'withdrawn') THEN 'withdrawn'
      WHEN sum(state = 'purged') THEN 'purged' ELSE 'delivered' END
    FROM deliveries WHERE batch = new.batch) WHERE number = new.batch; END;
CREATE TRIGGER delivery_moved AFTER UPDATE OF state ON deliveries WHEN old.state <> new.state BEGIN
  UPDATE queues SET batches = batches - 1,
    nonces = nonces - (SELECT nonces FROM batches WHERE number = new.batch)
    WHERE receiver = old.receiver AND state = old.state;
  INSERT INTO queues SELECT new.receiver, new.state, 1, nonces FROM batches WHERE number = new.batch
    ON CONFLICT DO UPDATE SET batches = batches + 1, nonces = nonces + excluded.nonces;
  UPDATE batches SET changed_at = new.changed_at, state = (
    SELECT CASE WHEN sum(state = 'pending') THEN 'pending' WHEN sum(state = 'dead') THEN 'dead'
      WHEN sum(state = 'expired') THEN 'expired' WHEN sum(state = 'withdrawn') THEN 'withdrawn'
      WHEN sum(state = 'purged') THEN 'purged' ELSE 'delivered' END
    FROM deliveries WHERE batch = new.batch) WHERE number = new.batch; END;
CREATE TRIGGER batch_formed AFTER INSERT ON batches WHEN new.kind = 'generated' BEGIN
  INSERT INTO stages VALUES (new.state, new.nonces) ON CONFLICT DO UPDATE SET nonces = nonces + new.nonces; END;
CREATE TRIGGER batch_moved AFTER UPDATE OF state ON batches
  WHEN old.state <> new.state AND new.kind = 'generated' BEGIN
  UPDATE stages SET nonces = nonces - new.nonces WHERE state = old.state;
  INSERT INTO stages VALUES (new.state, new.nonces) ON CONFLICT DO UPDATE SET nonces = nonces + new.nonces; END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('proofs',4);
INSERT INTO "sqlite_sequence" VALUES('batches',1);
COMMIT;
