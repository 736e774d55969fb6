-- What the customer said stays as he said it.
CREATE TRIGGER reference_values_do_not_change BEFORE UPDATE ON reference_values
BEGIN SELECT RAISE(ABORT, 'a version of the reference values is never changed'); END;
CREATE TRIGGER reference_values_do_not_go BEFORE DELETE ON reference_values
BEGIN SELECT RAISE(ABORT, 'every version of the reference values is kept'); END;
CREATE TRIGGER policies_do_not_change BEFORE UPDATE ON policies
BEGIN SELECT RAISE(ABORT, 'a version of a policy is never changed'); END;
CREATE TRIGGER policies_do_not_go BEFORE DELETE ON policies
BEGIN SELECT RAISE(ABORT, 'every version of a policy is kept'); END;
