"""Text in the front process: templates, tokens, incremental detokenising."""
