"""The steps of a run, and what jobs and commands share."""
