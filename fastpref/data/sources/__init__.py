"""Sources of rows: local files, the Hugging Face hub, sets embedded in the package."""
