"""Other people's compressors on our prompts, each in a virtual environment of its own."""
