-- What a volume's size was when the customer's tool last said so, in bytes.
ALTER TABLE volumes ADD COLUMN size INTEGER;
-- When its keys were retired; kek_wrapped is empty from then on.
ALTER TABLE volumes ADD COLUMN retired_us INTEGER;
-- The key id that a rekey was given and has not said to be the only one.
ALTER TABLE volumes ADD COLUMN rekey_key_id INTEGER;
-- The key-encryption key that a rewrap was given, until an anchor names it.
ALTER TABLE volumes ADD COLUMN next_kek_id INTEGER;
ALTER TABLE volumes ADD COLUMN next_kek_wrapped BLOB;
-- The operation that a session was permitted and whose outcome has not come.
ALTER TABLE holders ADD COLUMN operation TEXT;
