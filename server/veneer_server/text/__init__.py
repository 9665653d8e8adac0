"""Text in the front process: templates, tokenization, incremental detokenization."""
