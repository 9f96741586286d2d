"""Preflight: compile a job's real program for a slice that is not there, and report memory, collectives and time."""
