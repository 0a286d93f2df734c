"""`vllm-kvcompress bench report`: every report of a folder as one page."""
