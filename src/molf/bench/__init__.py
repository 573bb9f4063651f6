"""``molf bench``: what a step of each optimizer costs, in time and in memory, side by side in one run."""
