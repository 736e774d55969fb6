-- How long the newest lease still lasted when it was given, in microseconds: what an instance may have left when a provider
-- starts whose wall clock nobody vouches for. Rows of before: the longest lease that a policy can give.
ALTER TABLE instances ADD COLUMN lease_us INTEGER NOT NULL DEFAULT 605404800000;
