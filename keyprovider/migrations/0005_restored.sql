-- After a restore: nothing is released for the customer until an administrator has confirmed what the backup brought back.
ALTER TABLE customers ADD COLUMN unconfirmed INTEGER NOT NULL DEFAULT 0;
