"""The demo model: its language, its training, and the request that shows it off."""
