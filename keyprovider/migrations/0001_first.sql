-- Times are microseconds since 1970 UTC. Key ids are 64-bit numbers kept as SQLite's signed integers, bit for bit.
-- "wrapped" columns hold keys under the master key, with an AAD that names what they are (keystore.rs).

CREATE TABLE meta (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT;

-- The provider's own keys: audit log, directives, the two certificate authorities.
CREATE TABLE provider_keys (
    name    TEXT PRIMARY KEY NOT NULL,
    wrapped BLOB NOT NULL,
    public  BLOB NOT NULL
) STRICT;

-- Every key id ever given out, so that none is given out twice.
CREATE TABLE key_ids (id INTEGER PRIMARY KEY NOT NULL) STRICT;

CREATE TABLE customers (
    id         TEXT PRIMARY KEY NOT NULL,
    lab        INTEGER NOT NULL,
    policy_key BLOB NOT NULL,
    created_us INTEGER NOT NULL
) STRICT;

CREATE TABLE admins (
    name       TEXT PRIMARY KEY NOT NULL,
    key        BLOB NOT NULL UNIQUE,
    role       TEXT NOT NULL CHECK (role IN ('admin', 'auditor')),
    customer   TEXT REFERENCES customers (id),
    created_us INTEGER NOT NULL,
    revoked    INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE clouds (
    id    TEXT PRIMARY KEY NOT NULL,
    kind  TEXT NOT NULL CHECK (kind IN ('lab', 'maker')),
    roots TEXT NOT NULL
) STRICT;

CREATE TABLE customer_clouds (
    customer TEXT NOT NULL REFERENCES customers (id),
    cloud    TEXT NOT NULL REFERENCES clouds (id),
    PRIMARY KEY (customer, cloud)
) STRICT;

-- A host is its endorsement key; what stands here about it never changes.
CREATE TABLE hosts (
    id          BLOB PRIMARY KEY NOT NULL,
    cloud       TEXT NOT NULL REFERENCES clouds (id),
    name        TEXT,
    certificate BLOB,
    enrolled_us INTEGER NOT NULL,
    UNIQUE (cloud, name)
) STRICT;
CREATE TRIGGER hosts_do_not_change BEFORE UPDATE ON hosts
BEGIN SELECT RAISE(ABORT, 'a host in the inventory is never changed'); END;

-- Attestation keys that were proved to live beside a host's endorsement key.
CREATE TABLE aks (
    host         BLOB NOT NULL REFERENCES hosts (id),
    name         BLOB NOT NULL,
    public       BLOB NOT NULL,
    activated_us INTEGER NOT NULL,
    PRIMARY KEY (host, name)
) STRICT;
CREATE TRIGGER aks_do_not_change BEFORE UPDATE ON aks
BEGIN SELECT RAISE(ABORT, 'an activated attestation key is never changed'); END;

-- Where the replay of a host's IMA log ended at its last good attestation for a customer under these reference values:
-- what came before was judged by them, and by nobody else's.
CREATE TABLE ima (
    customer    TEXT NOT NULL REFERENCES customers (id),
    host        BLOB NOT NULL,
    ak          BLOB NOT NULL,
    reference   INTEGER NOT NULL,
    reset_count INTEGER NOT NULL,
    log_offset  INTEGER NOT NULL,
    pcr         BLOB NOT NULL,
    PRIMARY KEY (customer, host, ak)
) STRICT;

CREATE TABLE reference_values (
    customer TEXT NOT NULL REFERENCES customers (id),
    version  INTEGER NOT NULL,
    document TEXT NOT NULL,
    set_us   INTEGER NOT NULL,
    PRIMARY KEY (customer, version)
) STRICT;

CREATE TABLE policies (
    customer  TEXT NOT NULL REFERENCES customers (id),
    version   INTEGER NOT NULL,
    document  TEXT NOT NULL,
    signature BLOB NOT NULL,
    set_us    INTEGER NOT NULL,
    PRIMARY KEY (customer, version)
) STRICT;

CREATE TABLE vms (
    customer             TEXT NOT NULL REFERENCES customers (id),
    id                   TEXT NOT NULL,
    current_file         BLOB,
    instance_floor       INTEGER NOT NULL DEFAULT 1,
    -- After a restore: until then an instance that this database never saw may run.
    unconfirmed_until_us INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (customer, id)
) STRICT;

-- One row for each sealing; the digest comes when the tool has sealed.
CREATE TABLE vm_files (
    customer  TEXT NOT NULL,
    vm        TEXT NOT NULL,
    key_id    INTEGER NOT NULL,
    wrapped   BLOB NOT NULL,
    digest    BLOB,
    disks     TEXT NOT NULL DEFAULT '[]',
    sealed_us INTEGER NOT NULL,
    PRIMARY KEY (customer, vm, key_id),
    FOREIGN KEY (customer, vm) REFERENCES vms (customer, id)
) STRICT;
CREATE UNIQUE INDEX vm_files_by_digest ON vm_files (customer, vm, digest) WHERE digest IS NOT NULL;

CREATE TABLE instances (
    customer        TEXT NOT NULL,
    vm              TEXT NOT NULL,
    number          INTEGER NOT NULL,
    client_key      BLOB NOT NULL,
    host            BLOB NOT NULL,
    ak              BLOB NOT NULL,
    reset_count     INTEGER NOT NULL,
    file            BLOB NOT NULL,
    started_us      INTEGER NOT NULL,
    lease_end_us    INTEGER NOT NULL,
    ended           INTEGER NOT NULL DEFAULT 0,
    revoked         INTEGER NOT NULL DEFAULT 0,
    report_sequence INTEGER NOT NULL DEFAULT 0,
    report_digest   BLOB NOT NULL,
    gap_at          INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (customer, vm, number),
    FOREIGN KEY (customer, vm) REFERENCES vms (customer, id)
) STRICT;
CREATE INDEX instances_by_key ON instances (client_key);

-- Restricted operations that were permitted, and whether their outcome came.
CREATE TABLE permits (
    attestation BLOB PRIMARY KEY NOT NULL,
    customer    TEXT NOT NULL,
    vm          TEXT NOT NULL,
    instance    INTEGER NOT NULL,
    operation   TEXT NOT NULL,
    outcome     INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX permits_by_instance ON permits (customer, vm, instance);

-- Keys of sealed streams (core dumps), kept so that the customer can open them.
CREATE TABLE stream_keys (
    key_id      INTEGER PRIMARY KEY NOT NULL,
    customer    TEXT NOT NULL,
    vm          TEXT NOT NULL,
    instance    INTEGER NOT NULL,
    attestation BLOB NOT NULL UNIQUE,
    wrapped     BLOB NOT NULL,
    created_us  INTEGER NOT NULL,
    -- The stream's final tag in hex, as its outcome was reported.
    tag         TEXT
) STRICT;

CREATE TABLE volumes (
    id          BLOB PRIMARY KEY NOT NULL,
    customer    TEXT NOT NULL REFERENCES customers (id),
    name        TEXT NOT NULL,
    kek_id      INTEGER NOT NULL,
    kek_wrapped BLOB NOT NULL,
    -- The id for new writes; unset until the volume is first opened.
    key_id      INTEGER,
    next_open   INTEGER NOT NULL DEFAULT 1,
    anchor      BLOB,
    -- After a restore: an administrator has to confirm the anchor.
    unconfirmed INTEGER NOT NULL DEFAULT 0,
    created_us  INTEGER NOT NULL,
    UNIQUE (customer, name)
) STRICT;

-- Who may write a volume just now: an instance or a session of the customer's tool.
CREATE TABLE holders (
    volume      BLOB PRIMARY KEY NOT NULL REFERENCES volumes (id),
    vm          TEXT,
    instance    INTEGER,
    session     BLOB,
    client_key  BLOB NOT NULL,
    open_number INTEGER NOT NULL,
    until_us    INTEGER NOT NULL,
    CHECK ((vm IS NULL) = (instance IS NULL) AND (vm IS NULL) <> (session IS NULL))
) STRICT;

-- Answers that hold keys, kept until their nonce's end so that a lost answer can be asked for again.
CREATE TABLE answers (
    attestation BLOB PRIMARY KEY NOT NULL,
    client_key  BLOB NOT NULL,
    evidence    BLOB NOT NULL,
    body        BLOB NOT NULL,
    until_us    INTEGER NOT NULL
) STRICT;

-- When operations were asked for with a VM in the last hour: policies may count them.
CREATE TABLE asked (
    customer TEXT NOT NULL,
    vm       TEXT NOT NULL,
    time_us  INTEGER NOT NULL
) STRICT;
CREATE INDEX asked_by_vm ON asked (customer, vm, time_us);

CREATE TABLE audit (
    customer TEXT NOT NULL REFERENCES customers (id),
    sequence INTEGER NOT NULL,
    event    BLOB NOT NULL,
    digest   BLOB NOT NULL,
    PRIMARY KEY (customer, sequence)
) STRICT;
CREATE TRIGGER audit_is_never_changed BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_never_cut BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
