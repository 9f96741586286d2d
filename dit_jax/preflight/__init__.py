"""What a run would be on a slice that is not there: its real program, compiled by the slice's own compiler."""
