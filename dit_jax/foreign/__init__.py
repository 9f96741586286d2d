"""Other people's networks: the names and layouts of their tensors, and ours. Pure functions of arrays; `convert` is the job."""
