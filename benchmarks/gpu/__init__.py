"""The sections of `gpu_check`, each run in a process of its own."""
