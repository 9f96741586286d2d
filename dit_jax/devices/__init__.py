"""Devices: the mesh, layouts of runs on slices, the processes of a job on several hosts."""
