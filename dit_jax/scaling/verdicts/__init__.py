"""What to think of runs and fits: their quality, tests of what a fit takes for granted, held-out errors, and where methods disagree."""
