"""FastKV and WindowKV written a second time, densely, and held against the engine."""
