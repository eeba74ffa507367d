"""What can be learned from finished runs: laws fitted to their losses."""
