"""The only room that knows devices: the mesh, layouts of slices, the processes of a job on several hosts."""
