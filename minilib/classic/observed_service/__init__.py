"""A service whose tail is slow, observed: logs, metrics and traces of real HTTP servers, or of simulated time."""
