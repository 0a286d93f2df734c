"""WHERE the kept tokens are: blocks on the scheduler's side, pages on the worker's."""
