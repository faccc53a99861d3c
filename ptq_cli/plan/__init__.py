"""Settings in, a plan out: every mistake of a user is found here."""
