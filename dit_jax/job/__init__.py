"""Shared by the jobs: the command line and its exit codes, `--help`, cells for a scheduler or for worker processes."""
