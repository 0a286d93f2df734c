"""WHO sees it: flags, request checks, metrics, routes."""
