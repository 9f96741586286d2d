"""Other projects' weights in and out, and folders of converted networks."""
